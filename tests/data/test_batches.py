"""Batches: a pure function of seed and step, each window once per epoch, padding never a target."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumiere.data.batches import (
    IGNORED,
    Batch,
    Windows,
    batch_at,
    batches_in_order,
    documents_at,
    documents_of,
    indices_at,
    make_batch,
    shift_at,
    steps_per_epoch,
)

DOCUMENTS = [[0, 10, 11, 12, 13, 14, 15, 16, 1], [0, 20, 1], [0, 1]]


@pytest.fixture(scope="module")
def windows() -> Windows:
    """Five windows, which batches of two do not divide: three of the first document, one of each other."""
    ids = np.array([token for document in DOCUMENTS for token in document], dtype=np.uint16)
    return Windows(ids, np.cumsum([0, *map(len, DOCUMENTS)]), context_size=4, sliding_window_size=2)


@pytest.fixture(scope="module")
def many_windows() -> Windows:
    """A hundred documents of one window each, identified by their second token."""
    ids = np.array([[0, 3 + number, 1] for number in range(100)]).ravel()
    return Windows(ids, np.arange(0, 301, 3), context_size=4, sliding_window_size=2)


def test_the_documents_of_batches_are_those_of_their_windows(windows: Windows) -> None:
    first, second = make_batch(windows, np.array([4, 0])), make_batch(windows, np.array([2, 3]))
    assert documents_of([first.to(torch.device("cpu")), second]).tolist() == [2, 0, 0, 1]
    texts = Batch(first.tokens, first.targets, first.num_targets)
    assert len(set(documents_of([texts, second, texts]).tolist())) == 2 + 2 + 2, "texts of their own"


def test_targets_are_the_next_tokens(windows: Windows) -> None:
    batch = make_batch(windows, np.array([0, 2, 3, 4]))
    assert batch.tokens.tolist() == [[0, 10, 11, 12], [15, 16, 1, 2], [0, 20, 1, 2], [0, 1, 2, 2]]
    assert batch.targets.tolist() == [
        [10, 11, 12, 13],
        [16, 1, IGNORED, IGNORED],
        [20, 1, IGNORED, IGNORED],
        [1, IGNORED, IGNORED, IGNORED],
    ]
    assert batch.num_targets == 9
    assert batch.documents is not None
    assert batch.documents.tolist() == [0, 0, 1, 2]
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens.is_contiguous()
    # The default `ignore_index` of cross_entropy.
    logits = torch.randn(4, 4, 30)
    summed = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    torch.testing.assert_close(mean, summed / batch.num_targets)


@given(num_windows=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_each_window_is_seen_once_per_epoch(num_windows: int, batch_size: int, seed: int, epoch: int) -> None:
    windows = Windows(np.array([0, 1] * num_windows), np.arange(0, 2 * num_windows + 1, 2), 4, 2)
    steps = steps_per_epoch(windows, batch_size)
    batches = [
        indices_at(step, windows, batch_size, seed).tolist() for step in range(epoch * steps, (epoch + 1) * steps)
    ]
    assert sorted(index for batch in batches for index in batch) == list(range(num_windows))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert len(batches[-1]) == num_windows - (steps - 1) * batch_size > 0


def test_each_epoch_and_seed_has_its_own_order(many_windows: Windows) -> None:
    def epoch(number: int, seed: int) -> tuple[int, ...]:
        steps = range(number * 10, (number + 1) * 10)
        return tuple(index for step in steps for index in indices_at(step, many_windows, 10, seed).tolist())

    orders = {epoch(number, seed) for number in range(4) for seed in range(4)}
    assert len(orders) == 16
    assert tuple(range(100)) not in orders


def test_a_batch_depends_on_its_step_only(many_windows: Windows) -> None:
    forward = [batch_at(step, many_windows, 7, seed=3).tokens for step in range(40)]
    torch.manual_seed(1)
    backward = [batch_at(step, many_windows, 7, seed=3).tokens for step in reversed(range(40))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    # Batches of another size have the same order.
    by_three = [index for step in range(34) for index in indices_at(step, many_windows, 3, seed=3)]
    assert (torch.cat(forward)[:100, 1] - 3).tolist() == by_three


def test_evaluation_reads_the_windows_in_order(windows: Windows) -> None:
    batches = list(batches_in_order(windows, 2))
    assert [len(batch.tokens) for batch in batches] == [2, 2, 1]
    whole = make_batch(windows, np.arange(5))
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), whole.tokens)
    assert torch.equal(torch.cat([batch.targets for batch in batches]), whole.targets)


@given(num_windows=st.integers(1, 12), num_parts=st.integers(1, 15))
def test_parts_of_a_batch_concatenate_to_it(num_windows: int, num_parts: int) -> None:
    targets = torch.arange(num_windows * 3).view(-1, 3)
    targets[:, 2] = torch.where(targets[:, 0] % 2 == 0, IGNORED, targets[:, 2])
    batch = Batch(torch.arange(num_windows * 3).view(-1, 3), targets, int((targets != IGNORED).sum()))
    parts = batch.split(num_parts)
    assert len(parts) == min(num_parts, num_windows)
    assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert {part.num_targets for part in parts} == {batch.num_targets}
    sizes = {len(part.tokens) for part in parts}
    assert max(sizes) - min(sizes) <= 1

    filled = batch.split(num_parts, fills=True)
    assert len(filled) == num_parts
    for part in filled[len(parts) :]:
        assert len(part.tokens) == 1
        assert part.num_targets == int((part.targets != IGNORED).sum()) == 0


def test_a_batch_is_split_without_waiting_for_the_device() -> None:
    tokens = torch.empty(5, 3, dtype=torch.long, device="meta")  # reading a value of the meta device raises
    assert [part.tokens.shape for part in Batch(tokens, tokens, 15).split(2)] == [(3, 3), (2, 3)]


def test_moving_a_batch_moves_all_tensors(windows: Windows) -> None:
    batch = make_batch(windows, np.arange(2)).to(torch.device("meta"))
    assert batch.tokens.is_meta
    assert batch.targets.is_meta
    assert batch.num_targets == 8


def test_shifts_are_spread_evenly_and_depend_on_epoch_and_seed() -> None:
    for stride in (1, 2, 57):
        shifts = [shift_at(epoch, stride, seed=0) for epoch in range(100 * stride)]
        counts = np.bincount(np.array(shifts) + stride // 2, minlength=stride)
        assert len(counts) == stride
        assert counts.min() >= 60  # of 100 expected: four standard deviations
        assert (min(shifts), max(shifts)) == (-(stride // 2), (stride - 1) // 2)
    assert [shift_at(epoch, 57, seed=1) for epoch in range(9)] != [shift_at(epoch, 57, seed=2) for epoch in range(9)]


def test_windows_shift_between_epochs_and_not_between_calls() -> None:
    ids = np.arange(3, 203)
    windows = Windows(ids, np.array([0, 200]), context_size=9, sliding_window_size=2, shifts=True)
    steps = steps_per_epoch(windows, 5)
    seen = []
    for epoch in range(12):
        shift = shift_at(epoch, windows.stride, seed=4)
        batches = [batch_at(step, windows, 5, seed=4) for step in range(epoch * steps, (epoch + 1) * steps)]
        starts = {row[0] - 3 for batch in batches for row in batch.tokens.tolist()}
        assert starts == {min(max(start + shift, 0), 190 if shift else 199) for start in range(0, 8 * len(windows), 8)}
        assert torch.equal(batches[0].tokens, batch_at(epoch * steps, windows, 5, seed=4).tokens)
        seen.append(frozenset(starts))
    assert len(set(seen)) > 4
    in_order = next(batches_in_order(windows, 5))
    assert in_order.tokens[:, 0].tolist() == [3, 11, 19, 27, 35], "an evaluation never shifts"


@pytest.mark.parametrize("shifts", [False, True])
def test_documents_of_a_step_are_those_of_its_tokens(shifts: bool) -> None:
    """Each document repeats one token of its own, which identifies the document of a window."""
    lengths = [4, 30, 11, 57, 2, 23]
    ids = np.repeat(np.arange(3, 9), lengths)
    windows = Windows(ids, np.cumsum([0, *lengths]), context_size=9, sliding_window_size=2, shifts=shifts)
    for step in range(12 * steps_per_epoch(windows, 4)):
        batch = batch_at(step, windows, 4, seed=1)
        targets = batch.targets[batch.targets != IGNORED]
        assert documents_at(step, windows, 4, seed=1) == (targets.unique() - 3).tolist()
        assert batch.num_targets == len(targets)
