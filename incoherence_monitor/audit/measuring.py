"""One model while it is scanned: run through the taps of the monitor, each layer measured while it runs.

Layer 5: imports capture, config, errors, ops, probe, records, reporting and watching.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..capture import AttentionInput
from ..capture.model import ModelCapture
from ..config import MonitorConfig
from ..errors import ModelError
from ..ops import head_statistics
from ..probe import run
from ..records import FloatArray, LayerInfo, Layout
from ..reporting import Reporter
from ..watching import attach
from .identities import IDENTITIES, violations
from .memory import out_of_memory, too_large
from .result import SCANNED, Check, HeadField, Window
from .weights import Projections


class _Quiet(Reporter):
    """Keeps what it is told: the scan's result says it."""

    def __init__(self) -> None:
        super().__init__()
        self.of_layer: dict[str, str] = {}

    def failed(self, doing: str, error: BaseException, *, layer: str = "") -> None:
        self.of_layer[layer] = f"{doing} it failed: {type(error).__name__}: {error}"

    def notice(self, kind: str, message: str) -> None:
        self.notices[kind] += 1


class Measuring:
    """One model while it is scanned."""

    def __init__(self, model: nn.Module) -> None:
        """Find its attention layers.

        Raises:
            ModelError: if it has none that can be reached.
        """
        self._model = model
        self._told = _Quiet()
        self._receive: Callable[[AttentionInput], None] = lambda given: None
        self._raised: BaseException | None = None
        self._capture: ModelCapture = attach(model, MonitorConfig(), self._offer, self._told, alone=True)
        self._modules = {tap.name: tap.module for tap in self._capture.taps}
        self._layers: dict[str, LayerInfo] = {}
        self._measured: dict[tuple[str, int], dict[str, dict[str, FloatArray]]] = {}
        self._worst: dict[str, tuple[float, str, str, int]] = {}
        self._checked = 0
        self._ranks: dict[str, Tensor] = {}
        self.unknown_ranks: dict[str, str] = {}
        self.out_of_reach: dict[str, str] = dict(self._capture.unreachable)

    def close(self) -> None:
        """Let go of the model."""
        self._capture.release()

    def _offer(self, given: AttentionInput) -> None:
        """Measure; what goes wrong here is raised behind the forward, which a tap must not break."""
        if self._raised is None:
            try:
                self._receive(given)
            except Exception as error:
                self._raised = error

    def feed(self, ids: Tensor, receive: Callable[[AttentionInput], None]) -> None:
        """One forward.

        Args:
            ids: int64 [tokens].
            receive: called with the queries and keys of every attention layer.

        Raises:
            ModelError: if the forward fails or memory runs out.
        """
        self._receive = receive
        try:
            self._capture.arm()
            with self._capture.probing() as root:
                run(root, lambda each: _forward(each, ids))
            if self._raised is not None:
                raise self._raised
        except Exception as error:
            kind = type(self._model).__name__
            if out_of_memory(error):
                raise ModelError(too_large(kind, f"running it on {len(ids)} tokens")) from error
            raise ModelError(f"{kind} failed on {len(ids)} tokens ({type(error).__name__}: {error}).") from error
        finally:
            self._capture.disarm()

    def measure(self, text: str, ids: Tensor) -> None:
        """One window: statistics, identities, and at the first the interaction ranks."""
        found = self._measured[text, len(ids)] = {}
        first = not self._ranks and not self.unknown_ranks
        with Projections(self._modules.values() if first else ()) as projections:

            def receive(given: AttentionInput) -> None:
                if given.query.shape[:3:2] != (1, len(ids)):
                    self._left_out(given.layer, f"it works on {list(given.query.shape)} where {len(ids)} tokens came")
                    return
                if first:
                    self._rank(given, projections)
                self._layer(given, text, found)

            self.feed(ids, receive)
        unseen = dict.fromkeys(self._capture.unseen(), self._capture.probable_cause())
        for layer, why in (unseen | self._capture.doubtful() | self._capture.why_unseen | self._told.of_layer).items():
            if layer not in self._layers:
                self._left_out(layer, why)
        if not found:
            why = next(iter(self.out_of_reach.values()), "no attention call came by")
            raise ModelError(f"{type(self._model).__name__} showed no attention that can be measured: {why}.")

    def _left_out(self, layer: str, why: str) -> None:
        self.out_of_reach.setdefault(layer, why)

    def _layer(self, given: AttentionInput, text: str, found: dict[str, dict[str, FloatArray]]) -> None:
        length = given.query.shape[2]
        self._layers.setdefault(given.layer, self._describe_layer(given))
        statistics = head_statistics(given.query, given.key, value=given.value, scale=given.scale)
        found[given.layer] = {each: value[0].double().cpu().numpy() for each, value in statistics.items()}
        seed = self._layers[given.layer].index
        sizes = violations(given.query, given.key, scale=given.scale, statistics=statistics, seed=seed)
        self._checked += 1
        for identity, size in sizes.items():
            if identity not in self._worst or size > self._worst[identity][0]:
                self._worst[identity] = size, given.layer, text, length

    def _describe_layer(self, given: AttentionInput) -> LayerInfo:
        index = next((tap.index for tap in self._capture.taps if tap.name == given.layer), None)
        if index is None:
            # Further uses of a module that one forward runs several times come behind.
            index = max(self._capture.found - 1, *(each.index for each in self._layers.values())) + 1
        _, query_heads, _, dim = given.query.shape
        return LayerInfo(given.layer, index, query_heads, given.key.shape[1], dim, precision=given.precision)

    def _rank(self, given: AttentionInput, projections: Projections) -> None:
        module = self._modules[given.layer if given.layer in self._modules else given.layer.rpartition("/")[0]]
        found = projections.ranks(module, given.query, given.key)
        if isinstance(found, str):
            self.unknown_ranks[given.layer] = found
        else:
            self._ranks[given.layer] = found

    def layout(self) -> Layout:
        """The layers that were seen, in the model's order."""
        return Layout(tuple(sorted(self._layers.values(), key=lambda layer: layer.index)), SCANNED)

    def windows(self) -> tuple[Window, ...]:
        """What was measured, by the layout."""
        layout = self.layout()
        result = []
        for (text, length), found in self._measured.items():
            values = np.full(layout.size, np.nan)
            for row in layout.rows:
                undefined = {layer.name: np.full(layer.heads(row.kind), np.nan) for layer in layout.layers}
                parts = [found.get(name, {}).get(row.name, empty) for name, empty in undefined.items()]
                values[layout.slices[row.name]] = np.concatenate(parts)
            result.append(Window(text, length, values))
        return tuple(result)

    def checks(self) -> tuple[Check, ...]:
        """The identities with their largest violations."""
        return tuple(Check(each, *self._worst[each.name], self._checked) for each in IDENTITIES)

    def interaction_ranks(self, layout: Layout) -> FloatArray:
        """[sum Hq], NaN where unknown."""
        unknown = {layer.name: torch.full((layer.query_heads,), torch.nan) for layer in layout.layers}
        return torch.cat([(unknown | self._ranks)[layer.name] for layer in layout.layers]).double().numpy()

    def fields(self, text: str, ids: Tensor, chosen: Sequence[tuple[LayerInfo, int, str]]) -> tuple[HeadField, ...]:
        """Queries and keys of the heads to be drawn, by one forward more."""
        found: dict[tuple[str, int], HeadField] = {}

        def receive(given: AttentionInput) -> None:
            for layer, head, why in chosen:
                if layer.name == given.layer:
                    query, key = given.query[0, head], given.key[0, layer.key_head_of(head)]
                    kept = (each.float().cpu().clone() for each in (query, key))
                    found[layer.name, head] = HeadField(layer.name, layer.index, head, why, text, given.scale, *kept)

        self.feed(ids, receive)
        return tuple(found[layer.name, head] for layer, head, _ in chosen)


def _forward(model: nn.Module, ids: Tensor) -> None:
    """One forward of a batch of one, without what its attention does not need."""
    names = inspect.signature(model.forward).parameters
    find: Any = getattr(model, "get_input_embeddings", None)
    embeddings = model if find is None else find()
    device = next((each.device for each in embeddings.parameters()), torch.device("cpu"))
    # Where weights have been offloaded, accelerate's hooks bring the input to where they are loaded.
    ids = ids[None].to("cpu" if device.type == "meta" else device)
    given: dict[str, Any] = {}
    if "use_cache" in names:
        given["use_cache"] = False
    if "logits_to_keep" in names:
        given["logits_to_keep"] = 1
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    if "input_ids" in names:
        model(input_ids=ids, **given)
    else:
        model(ids, **given)
