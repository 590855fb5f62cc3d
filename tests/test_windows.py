"""The estimator's windows: length, number, make-up and place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from incoherence_monitor import MonitorConfig
from incoherence_monitor.ops import copied, cut_windows
from incoherence_monitor.windows import (
    WindowPlan,
    choose_window,
    document_runs,
    extend_plan,
    rank_share,
    select_windows,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("lengths", "window"),
    [
        ([1024, 1024], 256),
        ([256, 255], 256),
        ([255, 255, 300], 128),
        ([100, 20, 70], 64),
        ([40], 32),
        ([5, 5], 32),
    ],
)
def test_the_largest_window_that_most_sequences_fill(lengths, window):
    assert choose_window(MonitorConfig(), torch.tensor(lengths)) == window


def test_a_window_set_by_the_user_is_kept():
    assert choose_window(MonitorConfig(window=100), torch.tensor([50])) == 100


@pytest.mark.parametrize("windows", [1, 7, 8, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 8, 16])
def test_ranks_share_the_windows_of_a_sample(windows, world):
    config = MonitorConfig(windows_per_sample=windows)
    shares = [rank_share(config, rank=rank, world_size=world) for rank in range(world)]
    assert sum(share[0] for share in shares) == (windows + 1) // 2
    assert sum(map(sum, shares)) == windows
    assert max(map(sum, shares)) - min(map(sum, shares)) <= 1


@settings(deadline=None)
@given(st.integers(1, 16), st.integers(1, 6), st.integers(32, 500), st.integers(1, 20))
def test_the_plan_takes_no_more_than_its_share_and_what_a_batch_holds(batch, micro_batches, length, windows):
    config = MonitorConfig(windows_per_sample=windows)
    share = rank_share(config, rank=0, world_size=1)
    plan = WindowPlan(32)
    for _ in range(micro_batches + 2):
        plan = extend_plan(plan, batch=batch, length=length, share=share, micro_batches=micro_batches)
    assert sum(map(sum, plan.parts)) <= windows
    for starts, offsets in plan.parts:
        assert 0 <= starts <= batch
        assert 0 <= starts + offsets <= batch * (length // 32)
    if batch * (length // 32) >= windows:
        # Few sequences, but long ones: offsets take what starts leave over.
        assert sum(map(sum, plan.parts)) == windows
    if batch * micro_batches >= windows:
        assert sum(map(sum, plan.parts)) == windows
        assert sum(part[0] for part in plan.parts) == (windows + 1) // 2


def test_windows_are_spread_over_the_micro_batches():
    plan = WindowPlan(32)
    for _ in range(4):
        plan = extend_plan(plan, batch=4, length=64, share=(4, 4), micro_batches=4)
    assert plan.parts == ((1, 1),) * 4
    assert plan.part(7) == (0, 0)


def choose(*, batch, length, window=32, part=(4, 4), valid=None, seed=(0, 1)):
    return select_windows(
        batch=batch, length=length, window=window, part=part, valid=valid, device=CPU, seed=seed
    )  # fmt: skip


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 5), st.integers(0, 5), st.integers(0, 99))
def test_windows_lie_inside_their_sequences(batch, length, starts, offsets, seed):
    chosen = choose(batch=batch, length=length, part=(starts, offsets), seed=(seed,))
    if length < 32 or starts + offsets == 0:
        assert chosen is None
        return
    assert chosen.windows.starts.shape == (starts + offsets,)
    assert chosen.windows.starts.min() >= 0
    assert chosen.windows.starts.max() <= length - 32
    assert (chosen.windows.starts[:starts] == 0).all()
    assert chosen.windows.rows.max() < batch
    assert chosen.keep is None


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 90), st.booleans()), min_size=1, max_size=6), st.integers(0, 99))
def test_windows_of_padded_sequences_hold_valid_tokens_alone(rows, seed):
    valid = torch.zeros(len(rows), 90, dtype=torch.bool)
    for at, (length, left) in enumerate(rows):
        valid[at, slice(90 - length, None) if left else slice(None, length)] = True
    chosen = choose(batch=len(rows), length=90, valid=valid, seed=(seed,))
    fits = {at for at, (length, _) in enumerate(rows) if length >= 32}
    assert chosen.keep.all() == bool(fits)
    assert chosen.keep.any() == bool(fits)
    for row, first in zip(
        chosen.windows.rows[chosen.keep].tolist(), chosen.windows.starts[chosen.keep].tolist(), strict=True
    ):
        assert row in fits
        assert valid[row, first : first + 32].all()
    for row, first in zip(chosen.windows.rows[:4].tolist(), chosen.windows.starts[:4].tolist(), strict=True):
        if row in fits:
            assert first == valid[row].long().argmax()


def test_a_hole_in_a_sequence_is_not_straddled():
    valid = torch.ones(1, 64, dtype=torch.bool)
    valid[0, 20] = False
    assert not choose(batch=1, length=64, part=(1, 0), valid=valid).keep.any()


@pytest.mark.parametrize("masked", [False, True])
def test_windows_cut_out_are_slices_of_the_batch(masked):
    query, key, value = (torch.randn(3, heads, 100, 5) for heads in (4, 2, 2))
    chosen = choose(batch=3, length=100, valid=torch.ones(3, 100, dtype=torch.bool) if masked else None)
    pieces = cut_windows(query, key, value, windows=chosen.windows)
    assert len(pieces) == 8
    for row, first, piece in zip(chosen.windows.rows.tolist(), chosen.windows.starts.tolist(), pieces, strict=True):
        for whole, window in zip((query, key), piece[:2], strict=True):
            assert torch.equal(window[0], whole[row, :, first : first + 32])
            assert window.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        torch.testing.assert_close(piece.value_lengths[0], value[row, :, first : first + 32].norm(dim=-1))


@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("sequences", [1, 3, 9])
def test_copies_are_the_windows_laid_out_alike(tokens_first, sequences):
    """Few sequences give windows whose values are measured once, many give more tokens than the windows hold."""
    heads = [torch.randn(sequences, 100, number, 5).transpose(1, 2) for number in (4, 2, 2)]
    if not tokens_first:
        heads = [each.contiguous() for each in heads]
    chosen = choose(batch=sequences, length=100)
    pieces = cut_windows(*heads, windows=chosen.windows)
    copies = copied(pieces)
    assert len(copies) == len(pieces)
    for piece, copy in zip(pieces, copies, strict=True):
        assert torch.equal(copy.query, piece.query)
        assert torch.equal(copy.key, piece.key)
        assert (copy.key.stride(1) < copy.key.stride(2)) is tokens_first
        assert torch.equal(copy.value_lengths, piece.value_lengths)
        assert copy.key.untyped_storage().data_ptr() != piece.key.untyped_storage().data_ptr()
        assert copy.query.untyped_storage().data_ptr() != piece.query.untyped_storage().data_ptr()


def test_layers_of_one_sample_share_a_draw_and_a_masked_batch_of_all_valid_tokens_has_the_same():
    first, again = (choose(batch=5, length=300, seed=(0, 40, 0, 0)) for _ in range(2))
    assert first.windows.starts is again.windows.starts
    masked = choose(batch=5, length=300, seed=(0, 40, 0, 0), valid=torch.ones(5, 300, dtype=torch.bool))
    assert torch.equal(masked.windows.starts, first.windows.starts)
    assert torch.equal(masked.windows.rows, first.windows.rows)


def test_draws_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = choose(batch=5, length=300, seed=(0, 40, 0, 0))
    torch.manual_seed(2)
    again = choose(batch=5, length=300, seed=(0, 40, 0, 0))
    other = choose(batch=5, length=300, seed=(0, 50, 0, 0))
    assert torch.equal(first.windows.starts, again.windows.starts)
    assert not torch.equal(first.windows.starts, other.windows.starts)


def test_all_windows_start_at_zero_where_sequences_are_one_window_long():
    assert (choose(batch=8, length=32).windows.starts == 0).all()
    assert sorted(choose(batch=8, length=32).windows.rows.tolist()) == list(range(8))


def test_a_batch_that_holds_few_windows_has_both_kinds():
    assert extend_plan(WindowPlan(32), batch=4, length=48, share=(4, 4), micro_batches=1).parts == ((2, 2),)
    assert extend_plan(WindowPlan(32), batch=1, length=300, share=(4, 4), micro_batches=1).parts == ((1, 7),)


def documents(lengths, padding, rows):
    """[rows, sum(lengths) + padding]: the same documents in each row, padding at the end."""
    length = sum(lengths) + padding
    starts = torch.zeros(rows, length, dtype=torch.bool)
    starts[:, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    valid = torch.arange(length).expand(rows, length) < sum(lengths)
    number = torch.where(valid, starts.cumsum(dim=1), -1)
    return starts, valid, number


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=8),
    st.integers(0, 40),
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, 1000),
)
def test_windows_never_straddle_documents(lengths, padding, rows, at_start, at_offset, seed):
    starts, valid, number = documents(lengths, padding, rows)
    chosen = select_windows(
        batch=rows, length=starts.shape[1], window=32, part=(at_start, at_offset), valid=valid, device=CPU,
        seed=(seed,), document_starts=starts,
    )  # fmt: skip
    if chosen is None:
        assert at_start + at_offset == 0 or starts.shape[1] < 32
        return
    fits = any(length >= 32 for length in lengths)
    assert chosen.keep.tolist() == [fits] * (at_start + at_offset)
    for window, (row, first) in enumerate(
        zip(chosen.windows.rows.tolist(), chosen.windows.starts.tolist(), strict=True)
    ):
        if fits:
            assert len(set(number[row, first : first + 32].tolist())) == 1
            assert number[row, first] > 0
            assert window >= at_start or starts[row, first]


def test_every_place_in_a_packed_batch_can_be_drawn():
    starts, valid, _ = documents([40, 10, 35], 3, 2)
    seen = set()
    for seed in range(400):
        chosen = select_windows(
            batch=2, length=88, window=32, part=(0, 2), valid=valid, device=CPU, seed=(seed,), document_starts=starts
        )
        seen |= set(zip(chosen.windows.rows.tolist(), chosen.windows.starts.tolist(), strict=True))
    assert seen == {(row, place) for row in range(2) for place in [*range(9), *range(50, 54)]}


def test_runs_of_documents():
    starts = torch.tensor([[True, False, True, False, False, True]])
    valid = torch.tensor([[False, True, True, True, True, True]])
    begins, remaining = document_runs(starts, valid)
    assert begins.tolist() == [[False, True, True, False, False, True]]
    assert remaining.tolist() == [[0, 1, 3, 2, 1, 1]]
    assert document_runs(starts, None)[1].tolist() == [[2, 1, 3, 2, 1, 1]]
