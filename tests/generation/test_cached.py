"""The cache against full forward passes that slide their windows by the same rule."""

import gc
from typing import Any

import pytest
import torch

from lumiere.components.layers import KVCache
from lumiere.generation.kv_cache import CachedDecoder, FullForward, few_threads, first_window, kept_when_full, step_rows
from tests.generation.conftest import CONTEXT_SIZE, VOCAB_SIZE, random_model

ROWS = [[0, 3, 4], [5] * 9, list(range(3, 30)), [7]]
SUPPRESSED = [0, 2]
EXACT = [("learned", torch.float32, 1e-4), ("learned", torch.float64, 1e-10)]
EXACT += [("rotary", torch.float32, 1e-4), ("rotary", torch.float64, 1e-10)]


def token(step: int, row: int) -> int:
    return 3 + (7 * step + 5 * row) % (VOCAB_SIZE - 3)


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("positions", "dtype", "tolerance"), EXACT)
@pytest.mark.parametrize("d_value", [7, 8])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[2:3], ROWS])
def test_each_step_is_that_of_a_full_forward_pass(
    positions: str, dtype: torch.dtype, tolerance: float, d_value: int, rows: list[list[int]]
) -> None:
    """Past the window several times, and with a row dropped and two swapped on the way."""
    model = random_model(positions, dtype, d_value)
    cached, slow = CachedDecoder(model, SUPPRESSED), FullForward(model, SUPPRESSED)
    assert_same(cached.start(rows), slow.start(rows), tolerance)
    num_rows = len(rows)
    for step in range(3 * CONTEXT_SIZE):
        if step == 20 and num_rows == 4:
            cached.keep([3, 1, 2])
            slow.keep([3, 1, 2])
            num_rows = 3
        tokens = [token(step, row) for row in range(num_rows)]
        logits_BV = cached.step(tokens)
        assert logits_BV.dtype == dtype
        assert_same(logits_BV, slow.step(tokens), tolerance)


@pytest.mark.parametrize(("positions", "dtype", "tolerance"), EXACT)
def test_rows_of_different_lengths_equal_the_same_rows_alone(
    positions: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = random_model(positions, dtype)
    together = CachedDecoder(model)
    alone = [CachedDecoder(model) for _ in ROWS]
    expected = torch.cat([decoder.start([row]) for decoder, row in zip(alone, ROWS, strict=True)])
    assert_same(together.start(ROWS), expected, tolerance)
    for step in range(2 * CONTEXT_SIZE):
        tokens = [token(step, row) for row in range(len(ROWS))]
        expected = torch.cat([decoder.step([one]) for decoder, one in zip(alone, tokens, strict=True)])
        assert_same(together.step(tokens), expected, tolerance)


@pytest.mark.parametrize("rows", [[[8]], [[8], [9, 10]]])
def test_a_new_text_sees_nothing_of_the_one_before(rows: list[list[int]]) -> None:
    """Where the memory of the cache is taken again, and where it is not."""
    cached, slow = CachedDecoder(random_model("rotary")), FullForward(random_model("rotary"))
    for begun in (ROWS[1:2], ROWS[1:3], rows, rows):
        assert_same(cached.start(begun), slow.start(begun), 1e-4)
        for step in range(5):
            tokens = [token(step, row) for row in range(len(begun))]
            assert_same(cached.step(tokens), slow.step(tokens), 1e-4)


def test_a_row_may_be_kept_twice() -> None:
    model = random_model("learned")
    cached, slow = CachedDecoder(model), FullForward(model)
    for decoder in (cached, slow):
        decoder.start([[4, 5]])
        decoder.keep([0, 0])
    for step in range(5):
        tokens = [token(step, 0), token(step, 1)]
        assert_same(cached.step(tokens), slow.step(tokens), 1e-4)


def test_the_window_slides_in_steps() -> None:
    """By hand: a window of 4 that is full keeps its last 2."""
    assert first_window([1, 2, 3, 4, 5, 6], 4) == [3, 4, 5, 6]
    assert kept_when_full([3, 4, 5, 6], 4) == [5, 6]
    assert kept_when_full([3], 1) == []
    model = random_model("learned")
    decoder = FullForward(model)
    text = [token(step, 0) for step in range(40)]
    decoder.start([text[:1]])
    for end in range(2, 41):
        actual = decoder.step([text[end - 1]])
        # 16 tokens, then 9 to 16 again and again.
        size = end if end <= 16 else 9 + (end - 17) % 8
        with torch.no_grad():
            expected = model.logits(torch.tensor([text[end - size : end]]))[:, -1]
        assert_same(actual, expected, 1e-5)


def test_a_window_of_one_token() -> None:
    torch.manual_seed(0)
    from lumiere.models.transformer import Transformer

    model = Transformer(VOCAB_SIZE, 8, 1, 1, 2, 4, 4, 8).eval()
    cached, slow = CachedDecoder(model), FullForward(model)
    assert_same(cached.start([[3, 4]]), slow.start([[3, 4]]), 1e-5)
    for step in range(3):
        assert_same(cached.step([token(step, 0)]), slow.step([token(step, 0)]), 1e-5)


def test_suppressed_ids_never_come() -> None:
    decoder = CachedDecoder(random_model("learned"), [0, 2, 39])
    for logits_BV in (decoder.start([[3]]), decoder.step([4])):
        assert (logits_BV == -torch.inf).nonzero()[:, 1].tolist() == [0, 2, 39]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_compiled_step_works_at_a_fixed_number_of_rows(positions: str) -> None:
    """What is called in the compiled step's place sees the same shapes at each step, though rows fall away."""
    model = random_model(positions)
    shapes = set()

    def counting(model: Any, cache: KVCache, tokens_B: torch.Tensor) -> torch.Tensor:
        shapes.add((cache.keys[0].shape, tokens_B.shape, cache.lengths.shape, cache.num_keys))
        return step_rows(model, cache, tokens_B)

    cached, slow = CachedDecoder(model, compiled_step=counting), FullForward(model)
    assert_same(cached.start(ROWS), slow.start(ROWS), 1e-4)
    kept = {3: [0, 2, 3], 12: [1]}
    num_rows = 4
    for step in range(2 * CONTEXT_SIZE):
        if step in kept:
            cached.keep(kept[step])
            slow.keep(kept[step])
            num_rows = len(kept[step])
        tokens = [token(step, row) for row in range(num_rows)]
        assert_same(cached.step(tokens), slow.step(tokens), 1e-4)
    assert len(shapes) == 1


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_a_model_that_changes_later_does_not_matter(rows: list[list[int]]) -> None:
    model = random_model("learned")
    decoder = CachedDecoder(model)
    first = decoder.start(rows).clone()
    step = decoder.step([3] * len(rows)).clone()
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_same(decoder.start(rows), first, 0)
    assert_same(decoder.step([3] * len(rows)), step, 0)


def test_memory_is_flat() -> None:
    decoder = CachedDecoder(random_model("learned"))
    decoder.start([[3]])

    def bytes_held() -> int:
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        return sum(x.nbytes() for x in {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}.values())

    held = []
    for step in range(100):
        decoder.step([token(step, 0)])
        if step in (40, 99):
            held.append(bytes_held())
    assert held[0] == held[1]


def test_small_work_takes_one_thread_and_gives_the_others_back() -> None:
    torch.set_num_threads(2)
    try:
        with few_threads(1000):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with few_threads(10**9):
            assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError), few_threads(1000):
            raise RuntimeError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
