"""What the processes of a run tell each other, over the default group: who holds what, once; then one sum a sample.

Every rank enters every collective at the same step: sampling is a function of the step alone, and a rank that failed
enters with count 0. So no rank can make another wait.

Layer 3: imports agreement, config, sampling, sharding, sums and torch.distributed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from .agreement import Declared, Holding, join, onto, places, renamed_layers
from .capture import AttentionInput
from .config import MOST_WINDOWS
from .errors import ModelError
from .records import IntArray, Layout
from .reporting import Reporter
from .sampling import WindowSampler
from .sharding import SPLIT_SEQUENCES, TensorPart, local_heads, split_sequences
from .stats import STATISTICS, HeadKind
from .sums import SampleSums
from .windows import Place

PROCESSES_CHANGED = (
    "the state was saved by another number of processes: the windows of a sample are shared out anew, their number "
    "and the baselines stay"
)


def rank_and_world() -> tuple[int, int]:
    """This process and the number of processes of the default group; (0, 1) if there is none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class SharedLayout:
    """What the ranks have agreed on, and sums over them.

    Before the first sample they agree on who holds which layers and who sees the same data, which settles who takes
    which windows; with the first sample on window lengths and heads. A layer that turns up later is left out, so that
    the collective is the same size everywhere.
    """

    def __init__(self, sampler: WindowSampler, reporter: Reporter) -> None:
        """Start without agreement.

        Args:
            sampler: told which windows fall to this rank.
            reporter: where disagreement is told.
        """
        self.declared: dict[str, Declared] = {}
        self.refused: dict[str, str] = {}
        self.stopped = False
        self._sampler, self._reporter = sampler, reporter
        self._prepared = False
        self._layout: Layout | None = None
        self._ranks: IntArray
        self._part = TensorPart(0)
        self._whole: set[str] = set()
        self._split_here: int | None = None

    @property
    def agreed(self) -> bool:
        """Whether the ranks add their samples."""
        return self._layout is not None

    def start_anew(self) -> None:
        """Forget what was agreed, as after a state was loaded; the ranks agree again when the next sample begins."""
        self._prepared, self._layout = False, None

    def prepare(self, tell: Callable[[], tuple[Holding, TensorPart]], state: str, layout: Layout | None) -> bool:
        """Agree on who holds what, once; every rank must call it at the same step.

        Args:
            tell: says what this rank holds and which part of the heads; may raise.
            state: names the state that this rank has gone on from, empty without.
            layout: of that state.

        Returns:
            False if ranks have gone on from different states, so that none of them may be kept.

        Raises:
            ModelError: on every rank, if models were given and none of them holds an attention layer to watch.
        """
        if self._prepared:
            return True
        self._prepared = True
        rank, _ = rank_and_world()
        try:
            own, self._part = tell()
        except Exception as error:  # This rank enters all the same, with nothing.
            self._reporter.failed("finding out which heads this rank holds", error)
            own, self._part = Holding({}, {}), TensorPart(rank)
        part = self._part
        texts, self._ranks = exchange(replace(own, state=state).to_dict(), [part.leader, part.coordinate, part.size])
        holdings = [Holding(**text) for text in texts]
        which, leaders = self._ranks[:, 0], self._ranks[:, 1]
        everyone = np.unique(leaders)
        place = Place(int(np.searchsorted(everyone, leaders[rank])), len(everyone))
        held = places([holding.layers for holding in holdings], which, leaders, rank=rank)
        if self._sampler.assign(held, others=place):
            self._reporter.notice("processes changed", PROCESSES_CHANGED)
        self.declared = {name: value for holding in holdings for name, value in holding.layers.items()}
        self._whole = {name for holding in holdings for name in holding.whole}
        self._refuse(renamed_layers(holdings))
        self._stop([holding.split for holding in holdings])
        nothing = [holding.nothing for holding in holdings if holding.nothing]
        if nothing and not self.declared:
            raise ModelError(nothing[0])
        alike = len({holding.state for holding in holdings}) == 1
        if alike:
            self._layout = layout
        return alike

    def admit(self, given: AttentionInput) -> AttentionInput | None:
        """What of an attention call may be measured on this rank.

        Args:
            given: the call.

        Returns:
            The call with the heads that lie on this rank as plain tensors; None where nothing may be measured.
        """
        query, over_tokens = local_heads(given.query, self._part)
        key, _ = local_heads(given.key, self._part)
        value = None if given.value is None else local_heads(given.value, self._part)[0]
        if self._split_here is None:
            self._split_here = split_sequences() if over_tokens is None else over_tokens
        if self._split_here is not None or given.layer in self.refused or query.shape[0] == 0:
            return None
        return replace(given, query=query, key=key, value=value)

    def add(self, sums: SampleSums, commands: Sequence[Any] = ()) -> tuple[SampleSums, list[Any]]:
        """Add a sample over the default group. Every rank must call it at the same sample.

        Args:
            sums: this rank's sample.
            commands: what this rank has been asked for, as JSON can hold it; told to the others only if there is any.

        Returns:
            The sum, equal on every rank; empty if nothing has been seen that ranks can share. And the commands of all
            ranks, each once, in the same order everywhere; none where nothing was shared.
        """
        if self._layout is None:
            self._agree(sums.layout)
        part = self._part
        mine = onto(sums, self._layout or Layout(()), coordinate=part.coordinate, size=part.size)
        if not mine.layout.size or self.stopped:
            return mine, []
        message = torch.from_numpy(pack(mine, self._split_here, commands=len(commands))).to(_device())
        dist.all_reduce(message)
        added, splits, follow = unpack(message.cpu().numpy(), mine.layout)
        self._stop(splits)
        told = exchange(list(commands), [])[0] if follow else []
        distinct = {json.dumps(command, sort_keys=True): command for of_rank in told for command in of_rank}
        return added, list(distinct.values())

    def _agree(self, layout: Layout) -> None:
        """Agree on window lengths and heads; nothing is settled while no rank has seen anything."""
        texts, ranks = exchange(
            {"layers": layout.to_list(), "statistics": layout.statistics, "split": self._split_here}, []
        )
        self._stop([text["split"] for text in texts])
        layouts = [Layout.from_list(text["layers"], text["statistics"]) for text in texts]
        which, leaders = ranks[:, 0], self._ranks[:, 1]
        parts = dict.fromkeys(map(tuple, np.column_stack([which, self._ranks[:, 2:4]]).tolist()))
        seen = [(coordinate, size, layouts[at]) for at, coordinate, size in parts if layouts[at].layers]
        if not seen:
            return
        self._layout, refused = join(seen, self.declared, world=len(which), whole=self._whole)
        self._refuse(refused)
        self._sampler.adopt(self._layout)
        # Layers shown by hand are held by those that have shown them. A rank that saw nothing at all had an empty
        # batch or failed, and holds what others do.
        names = [layer.name for layer in self._layout.layers if layer.name not in self.declared]
        held = [{layer.name for layer in of.layers} if of.layers else set(names) for of in layouts]
        shown = places([held_here & set(names) for held_here in held], which, leaders, rank=dist.get_rank())
        self._sampler.assign(shown)

    def _refuse(self, layers: Mapping[str, str]) -> None:
        new = {name: why for name, why in layers.items() if name not in self.refused}
        self.refused |= new
        for why in dict.fromkeys(new.values()):
            names = [name for name, reason in new.items() if reason == why]
            more = f" and {len(names) - 1} more layers are" if len(names) > 1 else " is"
            self._reporter.notice(f"ranks differ: {why}", f"{names[0]}{more} not watched: {why}.")

    def _stop(self, splits: Sequence[int | None]) -> None:
        found = next((split for split in splits if split is not None), None)
        if found is not None and not self.stopped:
            self.stopped = True
            self.refused |= dict.fromkeys(self.declared, SPLIT_SEQUENCES[found])
            self._reporter.notice(
                f"out of reach: {SPLIT_SEQUENCES[found]}",
                f"nothing is measured in this run: {SPLIT_SEQUENCES[found]}, so that no process sees the tokens of a "
                "window one after the other. Sequence and context parallelism are not supported.",
            )


def exchange(value: Any, numbers: Sequence[int]) -> tuple[list[Any], IntArray]:
    """Tell every rank a value; equal values are sent once, however many ranks hold them.

    Args:
        value: what JSON can hold, which few distinct ranks' worth of is expected.
        numbers: whole numbers of this rank's own, as many on every rank.

    Returns:
        The distinct values in the order of the first rank that holds each; and [world, 1 + numbers]: for every rank
        the position of its value, and its numbers.
    """
    rank, world = rank_and_world()
    text = json.dumps(value, sort_keys=True).encode()
    digest = hashlib.sha256(text).digest()
    name = [int.from_bytes(digest[at : at + 8], "little", signed=True) for at in (0, 8)]
    own = torch.tensor([*name, len(text), *numbers], device=_device())
    rows = torch.empty(world, len(own), dtype=own.dtype, device=own.device)
    dist.all_gather(list(rows.unbind()), own)
    table = rows.cpu().numpy()
    _, first, which = np.unique(table[:, :3], axis=0, return_index=True, return_inverse=True)
    values = []
    for root in sorted(first.tolist()):
        buffer = torch.empty(int(table[root, 2]), dtype=torch.uint8, device=own.device)
        if rank == root:
            buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(buffer, src=root)
        values.append(json.loads(bytes(buffer.cpu().numpy())))
    in_order = np.argsort(np.argsort(first))[which.reshape(-1)]
    return values, np.column_stack([in_order, table[:, 3:]])


_COUNTED = MOST_WINDOWS + 1
"""Windows of a head in a sample, over all ranks, stay below: two such counts fit one number of single precision."""
_FIRST_OF_KIND: dict[HeadKind, str] = {row.kind: row.name for row in reversed(STATISTICS)}


def pack(sums: SampleSums, split: int | None, *, commands: int = 0) -> NDArray[np.float32]:
    """The message of one sample: what is added over ranks, in slots that are the same on every rank.

    Single precision: whole numbers stay exact up to 16 million, and a mean of logs to 1e-7, as fine as the statistics
    are. Counts are a sample's windows, eight by default, so two of them travel in one number. Whether a window was
    finite belongs to a head, so it is sent once for all statistics of that head.

    Args:
        sums: this rank's sample over the layout of all ranks.
        split: position in `SPLIT_SEQUENCES` of what this rank has found, or None.
        commands: number of commands that this rank has for all.

    Returns:
        [S + S / 2 + heads + 4 + splits], the half rounded up.
    """
    heads = [sums.non_finite[sums.layout.slices[name]] for name in _FIRST_OF_KIND.values()]
    found = np.zeros(len(SPLIT_SEQUENCES))
    if split is not None:
        found[split] = 1
    few = [sums.too_short, sums.loss, sums.losses, commands]
    counts = np.append(sums.count, [0.0] * (len(sums.count) % 2)).reshape(-1, 2) @ [1.0, _COUNTED]
    return np.concatenate([sums.total, counts, *heads, few, found]).astype(np.float32)


def unpack(message: NDArray[np.float32], layout: Layout) -> tuple[SampleSums, list[int], int]:
    """The inverse of `pack`, after messages were added.

    Args:
        message: as `pack` returns it.
        layout: of all ranks.

    Returns:
        The sum; positions in `SPLIT_SEQUENCES` of what ranks have found; and the number of commands that follow.
    """
    slots = message.astype(np.float64)
    size, pairs = layout.size, (layout.size + 1) // 2
    total, paired, slots = slots[:size], slots[size : size + pairs], slots[size + pairs :]
    count = np.column_stack([paired % _COUNTED, paired // _COUNTED]).reshape(-1)[:size]
    of_head = {}
    for kind, name in _FIRST_OF_KIND.items():
        heads = layout.slices[name].stop - layout.slices[name].start
        of_head[kind], slots = slots[:heads], slots[heads:]
    non_finite = np.concatenate([of_head[row.kind] for row in layout.rows])
    too_short, loss, losses, commands = slots[:4].tolist()
    sums = SampleSums(layout, total, count, non_finite, int(too_short), loss, int(losses))
    return sums, np.flatnonzero(slots[4:]).tolist(), int(commands)


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
