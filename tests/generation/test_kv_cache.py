"""Cached decoding against full forward passes that slide their windows by the same rule."""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from lumiere.components.layers import KVCache
from lumiere.generation.kv_cache import CachedDecoder, FullForward, compiled_step, few_threads, slide, step_rows
from lumiere.models.transformer import Transformer
from tests.generation.conftest import CONTEXT_SIZE, VOCAB_SIZE, random_model
from tests.models.build import FEW_VARIANTS, ROTARY, VARIANTS

ROWS = [[0, 3, 4], [5] * 9, list(range(3, 30)), [7]]
VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
Variant = dict[str, Any]


def tokens_at(step: int, num_rows: int) -> list[int]:
    return [3 + (7 * step + 5 * row) % (VOCAB_SIZE - 3) for row in range(num_rows)]


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def assert_same_steps(
    cached: CachedDecoder,
    slow: FullForward,
    rows: Sequence[Sequence[int]],
    num_steps: int,
    kept: Mapping[int, Sequence[int]] | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Start with `rows` and take steps with both decoders; before some steps keep only some rows."""
    assert_same(cached.start(rows), slow.start(rows), tolerance)
    num_rows = len(rows)
    for step in range(num_steps):
        if kept and step in kept:
            cached.keep(kept[step])
            slow.keep(kept[step])
            num_rows = len(kept[step])
        tokens = tokens_at(step, num_rows)
        assert_same(cached.step(tokens), slow.step(tokens), tolerance)


FAST = [{"positions": positions, "d_value": 8} for positions in ("learned", "rotary")]


@pytest.mark.parametrize(
    ("variant", "dtype", "tolerance"),
    [
        *[(variant, torch.float32, 1e-4) for variant in FAST],
        *[
            pytest.param(variant, torch.float64, 1e-10, marks=[pytest.mark.slow] * (name not in FEW_VARIANTS))
            for name, variant in VARIANTS.items()
        ],
    ],
)
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[2:3], ROWS], ids=["short", "long", "many"])
def test_each_step_is_that_of_a_full_forward_pass(
    variant: Variant, dtype: torch.dtype, tolerance: float, rows: list[list[int]]
) -> None:
    """Past the window several times; a row is dropped and two are swapped on the way, then one is kept twice."""
    model = random_model(dtype, **variant)
    suppressed = [0, 2, 39]
    cached, slow = CachedDecoder(model, suppressed), FullForward(model, suppressed)
    kept = {20: [3, 1, 2], 30: [1, 1]} if len(rows) > 1 else {4: [0, 0], 30: [1]}
    assert_same_steps(cached, slow, rows, 3 * CONTEXT_SIZE, kept, tolerance)
    logits_BV = cached.step(tokens_at(0, len(kept[30])))
    assert logits_BV.dtype == dtype
    assert (logits_BV[0] == -torch.inf).nonzero().flatten().tolist() == suppressed


@pytest.mark.parametrize("rows", [[[8]], [[8], [9, 10]]])
def test_a_new_text_sees_nothing_of_the_one_before(rows: list[list[int]]) -> None:
    """Whether the memory of the cache is used again or not."""
    cached, slow = CachedDecoder(random_model(**ROTARY)), FullForward(random_model(**ROTARY))
    for begun in (ROWS[1:2], ROWS[1:3], rows, rows):
        assert_same_steps(cached, slow, begun, 5)


def test_the_window_slides_in_steps() -> None:
    windows = [[3, 4, 5, 6], [7, 8, 9], [6, 5, 4, 3]]
    assert slide(windows, 4) == [0, 2]
    assert windows == [[5, 6], [7, 8, 9], [4, 3]]
    model = random_model()
    decoder = FullForward(model)
    text = [token for step in range(40) for token in tokens_at(step, 1)]
    decoder.start([text[:1]])
    for end in range(2, 41):
        size = end if end <= 16 else 9 + (end - 17) % 8  # 16 tokens, then 9 to 16 again and again
        with torch.no_grad():
            expected = model.logits(torch.tensor([text[end - size : end]]))[:, -1]
        assert_same(decoder.step([text[end - 1]]), expected, 1e-5)


def test_a_window_of_one_token() -> None:
    model = Transformer(VOCAB_SIZE, 8, 1, 1, 2, 4, 4, 8).eval()
    assert_same_steps(CachedDecoder(model), FullForward(model), [[3, 4]], 3)


@VARIANT
def test_a_compiled_step_works_at_a_fixed_number_of_rows(variant: Variant) -> None:
    """A function in place of the compiled step sees the same shapes at each step, though rows are dropped."""
    model = random_model(**variant)
    shapes = set()

    def counting(model: Transformer, cache: KVCache, tokens_B: torch.Tensor) -> torch.Tensor:
        assert isinstance(cache.lengths, torch.Tensor)
        shapes.add((cache.keys[0].shape, tokens_B.shape, cache.lengths.shape, cache.num_keys))
        return step_rows(model, cache, tokens_B)

    kept = {3: [0, 2, 3], 12: [1]}
    assert_same_steps(CachedDecoder(model, compiled_step=counting), FullForward(model), ROWS, 2 * CONTEXT_SIZE, kept)
    assert len(shapes) == 1


def test_if_nothing_compiles_it_warns_once_and_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **options: Any) -> Any:
        def call(*arguments: Any) -> Any:
            raise RuntimeError("no C++ compiler\nand a long tale")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    warnings: list[str] = []
    model = random_model()
    assert_same_steps(CachedDecoder(model, compiled_step=compiled_step(warnings.append)), FullForward(model), [[3]], 3)
    (warning,) = warnings
    assert warning.endswith(": no C++ compiler")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@VARIANT
def test_a_compiled_step_gives_the_same_logits(variant: Variant) -> None:
    model = random_model(**variant)
    cached = CachedDecoder(model, compiled_step=compiled_step(pytest.fail))
    assert_same_steps(cached, FullForward(model), ROWS[:2], 30)


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_later_changes_of_the_model_have_no_effect(rows: list[list[int]]) -> None:
    model = random_model()
    decoder = CachedDecoder(model)
    first = decoder.start(rows).clone()
    step = decoder.step([3] * len(rows)).clone()
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(decoder.start(rows), first)
    assert torch.equal(decoder.step([3] * len(rows)), step)


def test_small_work_takes_one_thread_and_restores_the_others() -> None:
    torch.set_num_threads(2)
    try:
        for multiplications, num_threads in ((1000, 1), (10**9, 2)):
            with few_threads(multiplications):
                assert torch.get_num_threads() == num_threads
            assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError), few_threads(1000):
            raise RuntimeError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
