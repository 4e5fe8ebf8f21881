"""Hooks in generation with a cache, against full forward passes over each window."""

from functools import partial
from itertools import count

import pytest
import torch
from torch import Tensor

from lumiere.components.hooks import Hook, Place, hook_points, hooked, run_with_cache, with_place
from lumiere.components.layers import KVCache
from lumiere.errors import LumiereError
from lumiere.generation.kv_cache import CachedDecoder, FullForward, step_rows
from lumiere.generation.recording import Recorder
from lumiere.models.transformer import Transformer
from tests.generation.conftest import CONTEXT_SIZE, random_model
from tests.generation.test_kv_cache import ROWS, VARIANT, Variant, assert_same, assert_same_steps, tokens_at
from tests.models.build import ROTARY

C = CONTEXT_SIZE


def by_place(phase: float, axis: int, activation: Tensor, place: Place) -> Tensor:
    """Scale by a factor of its own at each position, which is on this axis, of the window and of the text."""
    factors_BT = 1 + 0.2 * torch.sin(place.positions + phase) + 0.1 * torch.cos(1.7 * place.in_text + phase)
    shape = [len(activation), *[1] * (activation.ndim - 1)]
    shape[axis] = factors_BT.shape[1]
    return activation * factors_BT.view(shape).to(activation)


def hooks_of(model: Transformer) -> dict[str, Hook]:
    """Scores and patterns are (B, H, T, S), all others (B, T, ...)."""
    axes = {name: 2 if name.endswith(("scores", "pattern")) else 1 for name in hook_points(model)}
    return {name: with_place(partial(by_place, number, axis)) for number, (name, axis) in enumerate(axes.items())}


@VARIANT
@pytest.mark.parametrize("rows", [[[5] * 9], ROWS[1:]], ids=["one", "many"])
def test_each_step_is_that_of_a_full_forward_pass_with_the_hooks(variant: Variant, rows: list[list[int]]) -> None:
    """Past the window, while rows are dropped and doubled; the factors at all points are different."""
    model = random_model(torch.float64, **variant)
    plain = FullForward(model).start(rows[:1])
    decoders = CachedDecoder(model, [0, 2]), FullForward(model, [0, 2])
    kept = {2: [2, 0, 1], 4: [1, 1]} if len(rows) > 1 else None
    with hooked(model, hooks_of(model)):
        assert not torch.allclose(plain, FullForward(model).start(rows[:1]), atol=1e-3)
        assert_same_steps(*decoders, rows, 6 if kept else 9, kept, 1e-10)


@pytest.mark.slow
@VARIANT
def test_a_hook_at_any_point_acts_alone(variant: Variant) -> None:
    model = random_model(torch.float64, **variant)
    decoders = CachedDecoder(model), FullForward(model)
    rows = [ROWS[0], list(range(3, 3 + C - 1))]
    for name, hook in hooks_of(model).items():
        with hooked(model, {name: hook}):
            assert_same_steps(*decoders, rows, 4, tolerance=1e-10)


@pytest.mark.parametrize("variant", [{}, ROTARY | {"d_value": 8}], ids=["ordinary", "one stream"])
def test_hooks_set_or_removed_within_a_text_act_on_all_of_it(variant: Variant) -> None:
    """As in the full forward passes: the cache holds nothing that was computed otherwise."""
    model = random_model(torch.float64, **variant)
    cached, slow = CachedDecoder(model), FullForward(model)
    assert_same(cached.start(ROWS[:1]), slow.start(ROWS[:1]), 1e-10)
    steps = count()

    def assert_same_step() -> None:
        tokens = tokens_at(next(steps), 1)
        assert_same(cached.step(tokens), slow.step(tokens), 1e-10)

    for names in ([], ["blocks.0.hook_resid_post"], ["blocks.1.attn.hook_z", "hook_embed"], [], ["ln_final.*"]):
        for _ in range(2):
            with hooked(model, {name: hooks_of(model).get(name, torch.neg) for name in names}):
                for _ in range(3):
                    assert_same_step()
    assert_same_step()


def test_without_hooks_the_bits_are_those_of_a_decoder_that_never_had_any() -> None:
    model = random_model(d_value=8)
    used, fresh = CachedDecoder(model), CachedDecoder(model)
    for rows in (ROWS[:1], ROWS):
        with hooked(model, hooks_of(model)):
            used.start(rows)
            used.step([3] * len(rows))
        assert torch.equal(used.start(rows), fresh.start(rows))
        for step in range(C):
            assert torch.equal(used.step(tokens_at(step, len(rows))), fresh.step(tokens_at(step, len(rows))))


def test_a_compiled_step_is_not_used_with_hooks() -> None:
    model = random_model(torch.float64)
    calls: list[int] = []

    def compiled(model: Transformer, cache: KVCache, tokens_B: Tensor) -> Tensor:
        calls.append(len(tokens_B))
        return step_rows(model, cache, tokens_B)

    cached = CachedDecoder(model, compiled_step=compiled)
    with hooked(model, hooks_of(model)):
        assert_same_steps(cached, FullForward(model), ROWS, 8, {3: [0, 2]}, 1e-10)
    assert not calls
    assert_same_steps(cached, FullForward(model), ROWS, 8, {3: [0, 2]}, 1e-10)
    assert calls == [4] * 8


def test_a_hook_sees_the_new_positions_and_where_they_stand() -> None:
    model = random_model()
    seen: list[tuple[tuple[int, ...], list[list[int]], list[list[int]]]] = []

    def see(activation: Tensor, place: Place) -> None:
        seen.append((tuple(activation.shape[:3]), place.positions.tolist(), place.in_text.tolist()))

    decoder = CachedDecoder(model)
    with hooked(model, {"blocks.1.attn.hook_pattern": with_place(see)}):
        decoder.start([[3, 4], list(range(3, 3 + C + 1))])
        decoder.step([5, 6])
    half, short = C // 2, [0, 1, *[-1] * (C - 2)]
    assert seen == [
        ((2, 4, C), [short, [*range(C)]], [short, [*range(1, C + 1)]]),
        # The second row's window slides, and both are computed again.
        ((2, 4, half), [short[:half], [*range(half)]], [short[:half], [*range(half + 1, C + 1)]]),
        ((2, 4, 1), [[2], [half]], [[2], [C + 1]]),
    ]
    seen.clear()
    with hooked(model, {"hook_embed": with_place(see)}):
        model.logits(torch.tensor([[3, 4, 5]]))
    assert seen == [((1, 3, 32), [[0, 1, 2]], [[0, 1, 2]])]


@VARIANT
def test_activations_kept_in_generation_are_those_of_one_forward_pass(variant: Variant) -> None:
    """Over the last window of the text; before it slides, over all of it."""
    model, watched = (random_model(torch.float64, **variant) for _ in range(2))
    decoder, text = CachedDecoder(watched), list(ROWS[0])
    recorder = Recorder(watched, ["*"])
    with hooked(watched, recorder.hooks):
        decoder.start([text])
        for step in range(18):
            text += tokens_at(step, 1)
            decoder.step(text[-1:])
            if step not in (6, 17):
                continue
            found = recorder.activations()
            with torch.no_grad():
                expected = run_with_cache(model, torch.tensor([text[recorder.start :]]))[1]
            assert found.keys() == expected.keys()
            assert recorder.start == (0 if step == 6 else 8)
            for name, activation in found.items():
                torch.testing.assert_close(activation, expected[name][0], rtol=0, atol=1e-10)


def test_several_texts_at_once_are_refused_and_unknown_names_too() -> None:
    model = random_model()
    recorder = Recorder(model, ["hook_embed"])
    with pytest.raises(ValueError, match="2 texts"), hooked(model, recorder.hooks):
        CachedDecoder(model).start(ROWS[:2])
    with pytest.raises(LumiereError):
        Recorder(model, ["blocks.7.*"])
