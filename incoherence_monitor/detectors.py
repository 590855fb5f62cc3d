"""The detector: which streams have left their own past, compared with what all heads do together.

From one sample of log statistics [S] to a `Verdict`. Three adaptive rules (DETECTION.md, "A detector that works", and
docs/detection.md for what was tried):

- **cohort-relative**: a head's departure from its baseline less the median departure of its cohort, in units of both
  scales together. It takes out what all heads do at once: learning rate, data, early training.
- **layer-wise**: what the heads of a layer do together (layerwise.py).
- **model-wide**: the median over heads of each head's departure from its own baseline (modelwide.py).

Departures add up to **evidence**, a running mean over the last few samples. A family is one statistic of one cohort;
its threshold is a multiple of what its largest evidence usually is in this run, so it rises with the number of heads
and with how heavy tails are, and the multiple is what `false_alarm_every` sets. A sample far out does not enter its
baseline, nor does one of a stream under alarm.

A rule judges a stream only once the baseline has earned it: it must hold enough samples, and its own recent forecasts
must have been about as good as its scale claims. Early in training, statistics bend faster than any line; a baseline
that is armed by count alone then cries wolf, and one that is armed by its record waits until the bend is over.

Layer 2: imports baseline, layerwise, modelwide, thresholds and vectors (the sideways edges), config, records and
verdict.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .baseline import ARMED_FROM, MAD_TO_SIGMA, Baseline, Prediction
from .config import MonitorConfig
from .layerwise import Layerwise
from .modelwide import Modelwide
from .records import BoolArray, FloatArray, IntArray, Layout
from .thresholds import (
    ALONE_TAIL,
    LAYER_TAIL_RATE,
    LAYER_TAIL_START,
    PRIOR_LEVEL,
    SETTLED_FROM,
    SETTLING,
    SMALL_COHORT,
    TAIL_RATE,
    TAIL_START,
    TAILS,
    alone_tail,
    quantiles,
)
from .vectors import EXCURSION_FROM, Evidence, Levels, Trust, Vectors
from .verdict import Verdict

COHORT_SPREAD = 3.0
"""How much the present spread of a cohort counts for in the scale of its heads' deviations."""
LEARNED_BELOW = 5.0
"""Deviation beyond which a sample does not enter its baseline, whatever the evidence."""
EARLY_STEPS = 100
"""Before this training step no layer, nor the model, is judged as one: learning begins with all heads moving."""


class DriftDetector:
    """Baselines and rules for every stream of a layout. Vectorised; about 350 bytes a stream."""

    def __init__(self, layout: Layout, config: MonitorConfig) -> None:
        """Start with empty baselines.

        Args:
            layout: the streams of a sample.
            config: which statistics raise alerts, how long the baseline is, how rare false warnings shall be.
        """
        self.config = config
        self.baseline = Baseline(layout.size, config.baseline_samples)
        self.evidence = Evidence(layout.size)
        self.trust = Trust(layout.size)
        self.modelwide = Modelwide(layout, config.baseline_samples, config.false_alarm_every)
        self._forecast: tuple[int, Prediction] | None = None
        self._arrange(layout)
        self.levels = Levels(self._prior)
        self.layerwise = Layerwise(layout, self._families, self._layer_prior)

    def _arrange(self, layout: Layout) -> None:
        self.layout = layout
        self.judged = np.zeros(layout.size, dtype=bool)
        # Ranks with other settings record what all of them do.
        alerting = [name for name in self.config.statistics if name in layout.slices]
        for name in alerting:
            self.judged[layout.slices[name]] = True
        for layer_at, layer in enumerate(layout.layers):
            if 0 < layer.window <= layer.head_dim + 1:
                # Key leverage is the constant (L - 1) / d there (METRICS.md).
                leverage = np.zeros(layout.size, dtype=bool)
                leverage[layout.slices["key_leverage"]] = True
                self.judged &= ~(leverage & (layout.stream_layer == layer_at))
        names = np.array([f"{layer.cohort}/{layer.head_dim}" for layer in layout.layers], dtype=object)
        cohort = names[layout.stream_layer] if layout.layers else np.array([], dtype=object)
        self.alone = np.zeros(layout.size, dtype=bool)
        self._families: list[IntArray] = []
        tails = list[float]()
        for name in alerting:
            part = layout.slices[name]
            inside = np.arange(part.start, part.stop)
            inside = inside[self.judged[inside]]
            members = [inside[cohort[inside] == label] for label in sorted(set(cohort[inside]))]
            if layout.stream_of_weights[part].any():
                few = [each for each in members if len(each) < SMALL_COHORT]
                self.judged[[stream for each in few for stream in each]] = False
                members = [each for each in members if len(each) >= SMALL_COHORT]
            self._families += members
            for family in members:
                factor, few_heads = TAILS.get(name, 1.0), len(family) < SMALL_COHORT
                self.alone[family] = few_heads
                tails.append(max(factor, ALONE_TAIL) if few_heads else factor)
        # Weights hardly scatter: what training does to all of them stands out against their own past alone.
        self.judged_as_one = self.judged & ~layout.stream_of_weights
        self.armed_from = np.full(layout.size, ARMED_FROM)
        for name in SETTLING:
            if name in layout.slices:
                self.armed_from[layout.slices[name]] = min(SETTLED_FROM, self.config.baseline_samples)
        quantile = quantiles([len(members) for members in self._families])
        layers = quantiles([len(np.unique(layout.stream_layer[members])) for members in self._families])
        self._prior, self._layer_prior = PRIOR_LEVEL * quantile, PRIOR_LEVEL * layers
        every = self.config.false_alarm_every
        rare = np.log(every * max(1, len(quantile)))
        self._tail = np.array(tails) * (TAIL_START + TAIL_RATE * rare / quantile)
        self._layer_tail = np.maximum(tails, 1.0) * (LAYER_TAIL_START + LAYER_TAIL_RATE * rare / layers)
        heads = [int(self.judged_as_one[part].sum()) for part in layout.slices.values()]
        self._model_threshold = self.modelwide.threshold * np.array([alone_tail(number) for number in heads])

    @property
    def threshold(self) -> FloatArray:
        """Evidence beyond which a stream is under alarm, [S]; infinite where nothing is judged."""
        result = np.full(self.layout.size, np.inf)
        for members, limit in zip(self._families, self.levels.level * self._tail, strict=True):
            result[members] = limit
        return result

    def prepare(self, tick: int) -> None:
        """Draw the lines for a sample before it comes, which is most of the cost of judging it."""
        if self._forecast is None or self._forecast[0] != tick:
            self._forecast = (tick, self.baseline.predict(tick))

    def judge(self, log_values: FloatArray, *, tick: int, step: int) -> Verdict:
        """Judge one sample and let its unflagged part into the baseline.

        Args:
            log_values: [S] logarithms; NaN or infinite where undefined: not judged, not learned.
            tick: number of this sample, growing by one a sample.
            step: its training step.

        Returns:
            The verdict.
        """
        self.prepare(tick)
        assert self._forecast is not None
        expected, scale = self._forecast[1]
        model, model_judged = self.modelwide, self.modelwide.takes(step, self.baseline)
        known = np.isfinite(log_values)
        passed_over = self.alone & (not model_judged)
        of_weights = self.layout.stream_of_weights
        if not known[of_weights].any():
            # Weights are not read of every sample: what they said stands until they are.
            passed_over = passed_over | of_weights
        residual = np.where(known & self.judged, log_values, np.nan) - expected
        deviation, width = self._against_cohort(residual, scale)
        enough = self.judged & (self.baseline.count >= self.armed_from)
        armed = self.trust.update(np.where(passed_over, np.nan, deviation), enough)
        deviation[~armed] = np.nan
        threshold = self.threshold
        evidence = self.evidence.update(deviation, step, threshold=threshold, passed_over=passed_over)
        size = np.nan_to_num(np.abs(evidence))
        beyond = size > threshold
        self.levels.update(self._largest(np.where(passed_over, np.nan, evidence)))

        early = step < EARLY_STEPS
        layer_deviation = self.layerwise.deviations(deviation)
        if early:
            layer_deviation[:] = np.nan
        layer_passed_over = self.layerwise.of_cells(passed_over)
        layer_evidence, layer_threshold = self.layerwise.judge(
            layer_deviation, step, tail=self._layer_tail, passed_over=layer_passed_over
        )
        layer_size = np.nan_to_num(np.abs(layer_evidence))
        layer_beyond = layer_size > layer_threshold

        if model_judged:
            line = self._forecast[1]
            model.judge(
                log_values, self.judged_as_one, self.baseline, line,
                tick=tick, step=step, early=early, threshold=self._model_threshold,
            )  # fmt: skip
        model_deviation, model_evidence = model.newest.deviation, model.standing()
        model_size = np.nan_to_num(np.abs(model_evidence))
        model_beyond = model_size > self._model_threshold

        layers_told, model_told = self._on_new_ground(log_values, known, layer_beyond, model_beyond)
        flagged = beyond | self.layerwise.of_streams(layer_beyond) | (np.nan_to_num(np.abs(deviation)) > LEARNED_BELOW)
        for part, moved in zip(self.layout.slices.values(), model_beyond, strict=True):
            flagged[part] |= moved
        self.baseline.push(log_values, tick, self.judged & known & ~flagged & ~passed_over)
        if model_judged:
            model.push(log_values, tick, self.judged & known & ~flagged)
        self._forecast = None
        # Statistics that a layer has never had, as values out of reach, wait for nothing.
        heard = self.judged & (self.baseline.count > 0)
        return Verdict(
            expected=np.exp(expected),
            deviation=deviation,
            width=width,
            evidence=evidence / threshold,
            passed_over=passed_over,
            alarm=beyond & still_departs(deviation, evidence) & ~passed_over,
            restless=size > threshold / 2,
            since=self.evidence.since,
            armed=armed,
            armed_share=float(armed[heard].mean()) if heard.any() else 0.0,
            layers_judged=not early,
            layer_deviation=self.layerwise.by_layer(layer_deviation),
            layer_evidence=self.layerwise.by_layer(layer_evidence / layer_threshold),
            layer_alarm=self.layerwise.by_layer(
                layers_told & still_departs(layer_deviation, layer_evidence) & ~layer_passed_over
            ),
            layer_restless=self.layerwise.by_layer(layer_size > layer_threshold / 2),
            layer_since=self.layerwise.by_layer(self.layerwise.evidence.since),
            model_judged=model_judged,
            model_deviation=model_deviation,
            model_evidence=model_evidence / self._model_threshold,
            model_alarm=model_told & still_departs(model_deviation, model_evidence) & model_judged,
            model_restless=model_size > self._model_threshold / 2,
            model_since=model.evidence.since,
        )

    def _on_new_ground(
        self, log_values: FloatArray, known: BoolArray, layers: BoolArray, model: BoolArray
    ) -> tuple[BoolArray, BoolArray]:
        """Those of the cells and statistics under alarm of which most heads are where their baselines have not been.

        A line that was drawn through an excursion which is over expects its trend to go on: what comes back to where it
        was before leaves the line, and nothing is broken.
        """
        if not (layers.any() or model.any()):
            return layers, model
        judged = self.judged & known
        layers = layers & self.layerwise.mostly(self.baseline.outside(log_values), judged)
        outside, judged = self.modelwide.lines(self.baseline).outside(log_values), self.judged_as_one & known
        parts = [(outside & judged)[part].sum() > 0.5 * judged[part].sum() for part in self.layout.slices.values()]
        return layers, model & np.array(parts)

    def _against_cohort(self, residual: FloatArray, scale: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Departure of every stream from its cohort's, in units of both scales together, and that unit; [S] each."""
        deviation, width = np.full(self.layout.size, np.nan), np.full(self.layout.size, np.nan)
        for members in self._families:
            ready = members[np.isfinite(residual[members])]
            apart, wide = residual[ready], 0.0
            if len(ready) >= SMALL_COHORT:
                apart = apart - np.median(apart)
                # Where heads drift apart from each other more widely, each of them counts for less.
                wide = COHORT_SPREAD * MAD_TO_SIGMA * float(np.median(np.abs(apart)))
            elif len(members) >= SMALL_COHORT:
                continue
            width[ready] = np.sqrt(scale[ready] ** 2 + wide**2)
            deviation[ready] = apart / width[ready]
        return deviation, width

    def _largest(self, evidence: FloatArray) -> FloatArray:
        """Largest evidence of each family, [F]; NaN where none of its streams is judged."""
        size = np.abs(evidence)
        largest = np.array([np.max(size[m], initial=-1.0, where=np.isfinite(size[m])) for m in self._families])
        return np.where(largest < 0, np.nan, largest)

    def relearn(self, streams: BoolArray) -> None:
        """Forget the baseline, trust and evidence of some streams: they arm again from new samples.

        Args:
            streams: [S] which ones; a statistic of which all judged streams are among them starts anew model-wide too.
        """
        self.baseline.forget(streams)
        self.trust.reset(streams, Trust(self.layout.size))
        self.evidence.reset(streams, Evidence(self.layout.size))
        self.layerwise.relearn(streams)
        self.modelwide.relearn(streams, self.judged_as_one)
        self._forecast = None

    def grow(self, layout: Layout) -> None:
        """Take over a layout with more layers; the streams known before keep their state."""
        positions = layout.positions_in(self.layout)
        self.baseline.remap(positions, Baseline(layout.size, self.config.baseline_samples))
        self.evidence.remap(positions, Evidence(layout.size))
        self.trust.remap(positions, Trust(layout.size))
        self._forecast = None
        self._arrange(layout)
        self.modelwide.grow(layout, positions)
        self.layerwise.grow(layout, self._families, positions, self._layer_prior)
        if len(self._prior) != len(self.levels.level):
            self.levels = Levels(self._prior)

    def _parts(self) -> dict[str, Vectors | Layerwise | Modelwide]:
        return {
            "baseline": self.baseline,
            "evidence": self.evidence,
            "trust": self.trust,
            "levels": self.levels,
            "layerwise": self.layerwise,
            "modelwide": self.modelwide,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a later judgement depends on, as tensors."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned for the same layout and baseline length."""
        self._forecast = None
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


def still_departs(deviation: FloatArray, evidence: FloatArray) -> BoolArray:
    """Whether the newest sample itself still departs to the side of the evidence."""
    same_side: BoolArray = np.nan_to_num(deviation * np.sign(evidence)) > EXCURSION_FROM
    return same_side
