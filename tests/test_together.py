"""Something comes of every layer whose windows are finished with others', whatever happens to one of them."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import pytest
import torch

from incoherence_monitor import together, transfer
from incoherence_monitor.ops import Begun
from incoherence_monitor.together import Together

HEADS, DIM = 2, 4


def begun(mark, windows=1, scale=0.5):
    """Windows whose keys say which layer they are of."""
    keys = torch.full((windows, HEADS, 8, DIM), float(mark))
    sums = (torch.zeros(windows, HEADS, DIM, DIM), torch.zeros(windows, HEADS, 2, DIM))
    return Begun(keys, None, sums, {}, scale)


@pytest.fixture
def finished(monkeypatch):
    """What is finished at once, by the marks of its layers; nothing but the keys is looked at."""
    calls = []

    def finish(group):
        calls.append([int(each.keys.flatten()[0]) for each in group])
        keys = torch.cat([each.keys for each in group])
        return {"key_norm": keys[:, :, 0, 0]}, torch.eye(DIM).expand(len(keys), HEADS, DIM, DIM)

    monkeypatch.setattr(together, "finish", finish)
    return calls


def arrive(batches):
    for batch in batches:
        names = batch.names
        batch.arrived(dict(zip(names, batch.hand_over(), strict=True)))


def marks(futures):
    """What came of each layer: the mark of its windows, or its error."""
    assert all(future.done() for future in futures)
    return [
        type(future.exception()) if future.exception() else int(future.result()[0].values["key_norm"][0, 0])
        for future in futures
    ]


def test_layers_that_are_alike_are_finished_together_in_their_order(finished):
    sample = Together()
    futures = [sample.add(begun(mark, windows=1 + mark % 2, scale=0.5 + mark // 4), None) for mark in range(1, 8)]
    arrive(sample.seal())
    assert finished == [[1, 2, 3], [4, 5, 6, 7]]
    assert [len(future.result()[0].keep) for future in futures] == [2, 1, 2, 1, 2, 1, 2]


def test_no_more_are_finished_at_once_than_memory_shall_be_taken_for(finished, monkeypatch):
    monkeypatch.setattr(together, "FINISHED_AT_ONCE", 3 * begun(1).bytes)
    sample = Together()
    for mark in range(1, 8):
        sample.add(begun(mark), None)
    sample.seal()
    assert finished == [[1, 2, 3], [4, 5, 6], [7]]


def test_what_is_more_than_may_be_held_is_finished_at_once(finished, monkeypatch):
    monkeypatch.setattr(together, "HELD", begun(1).bytes)
    sample = Together()
    sample.add(begun(1), None)
    assert finished == []
    sample.add(begun(2), None)
    assert finished == [[1, 2]]
    sample.add(begun(3, windows=2), None)
    assert finished == [[1, 2], [3]]


def of_five_layers(monkeypatch, name, error, fails):
    """What comes of five layers where a function of the module fails for some of what it is given."""
    whole = getattr(together, name)

    def failing(given):
        if fails(given):
            raise error
        return whole(given)

    monkeypatch.setattr(together, name, failing)
    sample = Together()
    futures = [sample.add(begun(mark), None) for mark in range(1, 6)]
    arrive(sample.seal())
    return marks(futures)


def test_memory_for_some_layers_is_enough_for_all(finished, monkeypatch):
    error = torch.OutOfMemoryError("a card with room for two layers at a time")
    assert of_five_layers(monkeypatch, "finish", error, lambda group: len(group) > 2) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "fails"),
    [
        ("finish", lambda group: any(each.keys.flatten()[0] == 3 for each in group)),
        ("unpacked", lambda tensors: (tensors["key_norm"] == 3).any()),
    ],
    ids=["finish", "unpacked"],
)
def test_one_layer_that_fails_takes_none_with_it(finished, monkeypatch, name, fails):
    found = of_five_layers(monkeypatch, name, ValueError("not this one"), fails)
    assert found == [1, 2, ValueError, 4, 5]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_nobody_waits_for_what_was_interrupted(finished, monkeypatch, interrupt):
    whole = together.finish

    def finish(group):
        if finished:
            raise interrupt
        return whole(group)

    monkeypatch.setattr(together, "finish", finish)
    monkeypatch.setattr(together, "FINISHED_AT_ONCE", 1)
    sample = Together()
    futures = [sample.add(begun(mark), None) for mark in range(1, 4)]
    with pytest.raises(interrupt):
        sample.seal()
    arrive(sample.seal())
    assert marks(futures) == [1, RuntimeError, RuntimeError]


def test_layers_may_come_from_several_threads(finished, monkeypatch):
    """As those recomputed for a backward do, on a thread a device."""
    monkeypatch.setattr(together, "HELD", 5 * begun(1).bytes)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        sample, futures = Together(), {}

        def add(first):
            futures[first] = [sample.add(begun(first + at), None) for at in range(200)]

        threads = [threading.Thread(target=add, args=(1000 * number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        arrive(sample.seal())
    finally:
        sys.setswitchinterval(interval)
    for first, mine in futures.items():
        assert marks(mine) == list(range(first, first + 200))


def test_a_sealed_sample_holds_nothing_on_its_device(finished):
    sample = Together()
    sample.add(begun(1), None)
    batches = sample.seal()
    tensors = batches[0].hand_over()
    alive = [weakref.ref(each) for each in tensors]
    del tensors
    gc.collect()
    assert alive
    assert not any(each() is not None for each in alive)


class Stream:
    """As much of a stream as is asked of it."""

    def __init__(self, name):
        self.name, self.device, self.waited = name, torch.device("cuda"), []

    def wait_stream(self, other):
        self.waited.append(other.name)


def test_windows_read_on_another_stream_are_waited_for(finished, monkeypatch):
    """A model's branches may run on streams of their own; its sample is sealed on one of them."""
    main, side = Stream("main"), Stream("side")
    present, recorded = [main], []
    for module in (together, transfer):
        monkeypatch.setattr(module, "present_stream", lambda device: present[0])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(stream.name))
    sample = Together()
    sample.add(begun(1), None)
    present[0] = side
    sample.add(begun(2), None)
    present[0] = main
    sample.add(begun(3), None)
    sample.seal()
    assert finished == [[1, 3], [2]]
    assert (main.waited, side.waited) == (["side"], [])
    assert recorded == ["main"] * 3
