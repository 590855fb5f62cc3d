"""Which windows of each layer fall to this rank, and for whom the plans in hand were made.

Layer 3: imports config and windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .config import MonitorConfig
from .windows import Place, rank_share


class Shares:
    """This rank's places among the replicas of layers. A plan is made for a share and holds for no other."""

    def __init__(self, config: MonitorConfig, place: Place) -> None:
        """Start with one place for all layers.

        Args:
            config: number of windows.
            place: this rank among all, until ranks have agreed on each layer's replicas.
        """
        self._config = config
        self._place = place
        self._places: Mapping[str, Place] = {}
        self._restored: dict[str, tuple[tuple[int, int], int]] = {}
        self.several = place.of > 1

    def place_of(self, layer: str) -> Place:
        """This rank's place among the replicas of a layer."""
        return self._places.get(layer, self._place)

    def share_of(self, layer: str) -> tuple[int, int]:
        """Windows of a layer that fall to this rank: at the start of sequences, at drawn offsets."""
        place = self.place_of(layer)
        return rank_share(self._config, rank=place.position, world_size=place.of) if place.of else (0, 0)

    def assign(
        self, planned: Iterable[str], places: Mapping[str, Place], *, others: Place | None = None
    ) -> tuple[set[str], bool]:
        """Take places.

        Args:
            planned: layers that there are plans for.
            places: by layer, beside those taken before.
            others: for layers that are not known yet; None leaves that as it is.

        Returns:
            Layers whose plan was made for another share; and whether restored plans were made for another number of
            replicas, as after a resume on other processes.
        """
        made_for = {name: self.share_of(name) for name in planned}
        restored, self._restored = self._restored, {}
        made_for |= {name: share for name, (share, _) in restored.items()}
        self._place, self._places = others or self._place, {**self._places, **places}
        stale = {name for name, share in made_for.items() if share != self.share_of(name)}
        return stale, any(replicas != self.place_of(name).of for name, (_, replicas) in restored.items())

    def state_dict(self, planned: Iterable[str]) -> dict[str, Any]:
        """By layer, the share that its plan was made for and the number of replicas."""
        return {name: [list(self.share_of(name)), self.place_of(name).of] for name in planned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember for whom the plans of a state were made, on whichever rank; `assign` then compares."""
        self._restored = {name: ((share[0], share[1]), replicas) for name, (share, replicas) in state.items()}
