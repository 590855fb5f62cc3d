"""One sample: from attention inputs to what goes on on the host.

Inside the layer's forward windows are chosen, and what is computed on them begins (see `computing`). A sample is
sealed with one copy to the host of what lies on devices; its host phase adds up what has come of each layer.

Layer 3: imports aside, computing, keeping, ops, records, shares, sums, transfer, weighing, windows, yielded,
capture.base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .aside import Aside
from .capture import AttentionInput
from .computing import Computing
from .config import MonitorConfig, check_count
from .keeping import WindowKeeper
from .ops import check_shapes, some_sequences
from .records import LayerInfo, Layout
from .shares import Shares
from .stats import statistic
from .sums import Part, SampleSums, summarise
from .transfer import capturing, to_host
from .weighing import Weighing
from .windows import Place, WindowPlan, choose_window, extend_plan, lengths_of, select_windows
from .yielded import LayerWindows


class WindowSampler:
    """Takes the windows of each layer; holds the plans, which are fixed with the first sample."""

    def __init__(self, config: MonitorConfig, *, rank: int = 0, world_size: int = 1, micro_batches: int = 1) -> None:
        """Start without plans.

        Args:
            config: window length and number.
            rank: this process among those that share a sample, until ranks have agreed on each layer's replicas.
            world_size: number of those processes.
            micro_batches: forwards of one step, at least 1.

        Raises:
            SettingError: if `micro_batches` is out of range.
        """
        self.config = config
        self.shares = Shares(config, Place(rank, world_size))
        self.whole: dict[str, LayerInfo] = {}
        self.micro_batches = check_count("micro_batches", micro_batches, of="forwards a step")
        if config.probe is not None:
            self.micro_batches = 1
        self.plans: dict[str, WindowPlan] = {}
        self.fixed: set[str] = set()
        self.layers: dict[str, LayerInfo] = {}
        self.skipped: Counter[str] = Counter()
        self._open: dict[str, LayerWindows] = {}
        self._seen: dict[str, int] = {}
        self._sealed = False
        self._contexts = self._contexts_before = 0
        self._layout = Layout((), config.recorded)
        self.barren: dict[str, int] = {}
        self._fruitful: set[str] = set()
        self._step, self._where = 0, 0.0
        self.weighing = Weighing()
        self.aside = Aside()
        self.on_error: Callable[[str, BaseException], None] = _pass_on
        self.keeper = WindowKeeper()
        also = tuple(name for name in config.recorded if statistic(name).on_request)
        self._computing = Computing(self.aside, also=also)

    def open(self, step: int) -> None:
        """Begin a sample; of a probe, always by the same windows."""
        self.weighing.open(step)
        self._step = step if self.config.probe is None else 0
        self._where = float(np.random.default_rng((self.config.seed, self._step)).random())
        self._open, self._seen, self._sealed = {}, {}, False
        self._computing.together.open()
        self._contexts, self._contexts_before = 0, self._contexts

    def left(self) -> bool:
        """Note that one of the step's contexts has ended.

        Returns:
            Whether it was the last, as far as can be told: as many as the sample before had, and every layer known,
            if only from a state, has shown all micro-batches that its windows are taken from.
        """
        self._contexts += 1
        known = self.fixed | self.layers.keys()
        return self._contexts == self._contexts_before and all(
            name in self.fixed and self._seen.get(name, 0) >= len(self.plans[name].parts) for name in known
        )

    def receive(self, given: AttentionInput, info: Callable[[AttentionInput], LayerInfo]) -> None:
        """Take the windows of one attention call.

        Args:
            given: the call.
            info: describes a layer that is seen for the first time.

        Raises:
            SettingError: if the shapes do not fit together.
        """
        if given.query.is_cuda and capturing():
            # Nothing is computed while a graph is captured, and what is done here would become part of it.
            self.skipped["calls while a CUDA graph was captured"] += 1
            return
        if self._sealed and given.layer not in self.layers:
            self.skipped["calls of layers first seen when their sample had ended"] += 1
            return
        with torch.no_grad():
            check_shapes(given.query, given.key, given.valid, given.starts, value=given.value)
            layer = self._layer(given, info)
            batch, _, length, _ = given.query.shape
            plan, share = self.plans[given.layer], self.shares.share_of(given.layer)
            missing = sum(share) - sum(sum(part) for part in plan.parts)
            if given.layer not in self.fixed and given.micro >= len(plan.parts) and missing > 0:
                plan = extend_plan(plan, batch=batch, length=length, share=share, micro_batches=self.micro_batches)
                self.plans[given.layer] = plan
            self._seen[given.layer] = given.micro + 1
            part = plan.part(given.micro)
            if sum(part) == 0:
                return
            held = self._open.get(given.layer)
            if held is None:
                held = self._open[given.layer] = LayerWindows(layer)
                try:
                    self.weighing.weigh(held, given.weights, self.skipped)
                except Exception as error:  # Of the weights alone: the windows are measured.
                    self.on_error(given.layer, error)
            if given.gradient is not None:
                # Whole sequences, since the identity holds for no part of one.
                some = some_sequences(batch, sum(part), given.precision, self._where)
                given.gradient(partial(held.take_gradient, self._computing.residuals_of(given, some)))
            chosen = select_windows(
                batch=batch,
                length=length,
                window=plan.window,
                part=part,
                valid=given.valid,
                device=given.query.device,
                seed=(self.config.seed, self._step, self.shares.place_of(given.layer).position, given.micro),
                document_starts=given.starts,
            )
            if chosen is None:
                self.skipped[f"windows for which no sequence had {plan.window} tokens"] += sum(part)
                return
            self.keeper.offer(layer, given, chosen, whole=self.whole.get(given.layer))
            held.parts += self._computing.parts_of(given, chosen)

    def _layer(self, given: AttentionInput, describe: Callable[[AttentionInput], LayerInfo]) -> LayerInfo:
        _, query_heads, _, dim = given.query.shape
        known = self.layers.get(given.layer)
        if known is None:
            known = describe(given)
            if given.layer in self.whole:
                known = replace(known, window=self.whole[given.layer].window)
            self.layers[given.layer] = known
        if known.precision != given.precision:
            # As where a run goes on in another precision.
            self.layers[given.layer] = known = replace(known, precision=given.precision)
        if known.window == 0:
            known = replace(
                known, window=choose_window(self.config, lengths_of(given.valid, given.starts, given.query.shape[2]))
            )
            self.layers[given.layer] = known
        self.plans.setdefault(given.layer, WindowPlan(known.window))
        if (known.query_heads, known.key_heads, known.head_dim) != (query_heads, given.key.shape[1], dim):
            raise ValueError(
                f"layer {given.layer} had {known.query_heads} query heads, {known.key_heads} key heads of width "
                f"{known.head_dim} before and now has {query_heads}, {given.key.shape[1]} of width {dim}"
            )
        return known

    def seal(self) -> Callable[[], SampleSums]:
        """End the sample: begin to copy what lies on devices to the host, once per device.

        Returns:
            The host phase, to be called on the worker, after all that it has been given before.
        """
        held = sorted(self._open.values(), key=lambda layer: layer.info.index)
        self._open, self._sealed = {}, True
        for name, plan in self.plans.items():
            planned = sum(map(sum, plan.parts))
            if planned and name not in self.fixed:
                self.fixed.add(name)
                missing = sum(self.shares.share_of(name)) - planned
                self.skipped["windows asked for that the step's batches cannot hold"] += missing
        self.skipped = +self.skipped
        layout = self._layout_of_all()
        # None stands for a residual on a device: what lies there is held until it has been copied, no longer.
        taken = []
        for layer in held:
            residuals = [None if isinstance(each, Tensor) else each for each in layer.residuals]
            taken.append((layer.info, list(layer.parts), residuals, tuple(layer.weights)))
        with torch.no_grad():
            batches = self._computing.together.seal()
        on_device = [tensor for batch in batches for tensor in batch.hand_over()]
        for layer in held:
            on_device += [each for each in layer.residuals if isinstance(each, Tensor)]
            on_device += layer.weights.values()
        arrived = to_host(on_device)

        def finish() -> SampleSums:
            tensors = iter(arrived())
            for batch in batches:
                batch.arrived({name: next(tensors) for name in batch.names})
            on_host = []
            for info, parts, residuals, weights in taken:
                found = []
                for part in parts:
                    try:
                        found += _result_of(part)
                    except Exception as error:  # Of this layer alone: the others are judged.
                        self.on_error(info.name, error)
                there = []
                for each in residuals:
                    try:
                        there.append(next(tensors) if each is None else each())
                    except Exception as error:  # Of its residual alone.
                        self.on_error(info.name, error)
                others = {"shift_residual": there} | {name: [next(tensors)[None]] for name in weights}
                on_host.append((info, found, others))
            return summarise(layout, on_host)

        return finish

    def _layout_of_all(self) -> Layout:
        layers = tuple(sorted(self.layers.values(), key=lambda layer: layer.index))
        # One object for all samples: it holds arrays, and histories keep it.
        if self._layout.layers != layers:
            self._layout = Layout(layers, self.config.recorded)
        return self._layout

    def adopt(self, layout: Layout) -> None:
        """Take over the windows of layers that the ranks have agreed on; where one differs, its plan starts anew."""
        self.whole = {layer.name: layer for layer in layout.layers}
        for name, layer in self.layers.items():
            if name in self.whole and self.whole[name].window != layer.window:
                self.layers[name] = replace(layer, window=self.whole[name].window)
                self._forget_plans([name])

    def assign(self, places: Mapping[str, Place], *, others: Place | None = None) -> bool:
        """Take this rank's places among replicas; where its share is another than was planned for, plan anew.

        Args:
            places: by layer.
            others: for layers that are not known yet; None leaves that as it is.

        Returns:
            Whether plans were restored that had been made for another number of replicas.
        """
        stale, resized = self.shares.assign(self.plans, places, others=others)
        self._forget_plans(stale)
        return resized

    def forget(self) -> None:
        """Start without plans; layers keep their windows."""
        self._forget_plans(list(self.plans))

    def _forget_plans(self, names: Iterable[str]) -> None:
        for name in names:
            self.plans.pop(name, None)
            self.fixed.discard(name)

    def note(self, sums: SampleSums) -> None:
        """Remember layers that have yielded no window in any sample so far, and a window may never fit."""
        for at, layer in enumerate(sums.layout.layers):
            streams = sums.layout.stream_layer == at
            if sums.windows[streams].any() or sums.non_finite[streams].any():
                self.barren.pop(layer.name, None)
                self._fruitful.add(layer.name)
            elif layer.name not in self._fruitful:
                self.barren[layer.name] = layer.window

    def empty(self) -> SampleSums:
        """A sample in which nothing was seen."""
        return summarise(self._layout_of_all(), [])

    def state_dict(self) -> dict[str, Any]:
        """Plans and layers as plain values."""
        return {
            "plans": {name: [plan.window, [list(part) for part in plan.parts]] for name, plan in self.plans.items()},
            "fixed": sorted(self.fixed),
            "weighing": self.weighing.state_dict(alone=not self.shares.several),
            "planned_for": self.shares.state_dict(self.plans),
            "layers": Layout(tuple((self.whole or self.layers).values())).to_list(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Restore what `state_dict` returned, on whichever rank.

        Returns:
            Whether it was saved by another number of replicas, where that is known yet (see `assign`).
        """
        self.plans = {
            name: WindowPlan(window, tuple((part[0], part[1]) for part in parts))
            for name, (window, parts) in state["plans"].items()
        }
        self.fixed = set(state["fixed"])
        self.weighing.load_state_dict(state["weighing"], alone=not self.shares.several)
        self.shares.load_state_dict(state.get("planned_for", {}))
        layout = Layout.from_list(state["layers"])
        if self.shares.several:
            # Another rank's heads, or those of all ranks together: this one describes its own when it sees them.
            self.adopt(layout)
            return False
        self.layers = {layer.name: layer for layer in layout.layers}
        return self.assign({})


def _result_of(part: Future[list[Part]]) -> list[Part]:
    """What has come of a call's windows: the host phase comes after all that could still bring it."""
    if not part.done():
        raise RuntimeError("nothing has come of a layer's windows; whatever was to compute them was interrupted")
    return part.result()


def _pass_on(layer: str, error: BaseException) -> None:
    """What a sampler does with a layer's failure unless told otherwise: the whole sample fails."""
    raise error
