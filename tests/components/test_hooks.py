"""Hook points: their names, that replacements are used, and that a `with` block leaves no trace."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere.components.hooks import (
    Hook,
    HookPoint,
    hook_points,
    hooked,
    matching_names,
    run_with_cache,
    run_with_gradients,
)
from lumiere.errors import LumiereError
from lumiere.models.transformer import Transformer, TransformerOutput
from tests.models.build import ROTARY, VARIANTS
from tests.models.build import make_model as build

STREAM_NAMES = ["hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"]
ATTENTION_NAMES = [f"attn.hook_{name}" for name in ("q", "k", "v", "attn_scores", "pattern", "z")]
FEEDFORWARD_NAMES = ["mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"]
BLOCK_NAMES = STREAM_NAMES + ATTENTION_NAMES + FEEDFORWARD_NAMES
TOKENS_BT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def make_model(**changes: Any) -> Transformer:
    """B = 2, T = 5, L = 2, H = 3, K = 4, V = 6, F = 10, E = 8."""
    return build(0.5, **({"vocab_size": 11, "embedding_size": 8, "d_value": 6, "d_ff": 10} | changes))


@pytest.fixture(autouse=True)
def no_hook_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test does, every point it made is empty afterwards."""
    made: list[HookPoint] = []
    initialize = HookPoint.__init__

    def recorded(self: HookPoint) -> None:
        initialize(self)
        made.append(self)

    monkeypatch.setattr(HookPoint, "__init__", recorded)
    yield
    assert all(point.hook is None for point in made)


def test_names_and_shapes_are_those_of_transformer_lens() -> None:
    stream, heads, square, neurons = (2, 5, 8), (2, 5, 3), (2, 3, 5, 5), (2, 5, 10)
    expected = {"hook_embed": stream, "hook_pos_embed": stream}
    for layer in range(2):
        prefix = f"blocks.{layer}."
        expected |= {prefix + name: stream for name in STREAM_NAMES}
        expected |= {prefix + f"attn.hook_{name}": (*heads, 4) for name in "qk"}
        expected |= {prefix + f"attn.hook_{name}": (*heads, 6) for name in "vz"}
        expected |= {prefix + "attn.hook_attn_scores": square, prefix + "attn.hook_pattern": square}
        expected |= {prefix + name: neurons for name in FEEDFORWARD_NAMES}
    expected |= {"ln_final.hook_scale": (2, 5, 1), "ln_final.hook_normalized": stream}
    _, cache = run_with_cache(make_model(), TOKENS_BT)
    assert {name: tuple(activation.shape) for name, activation in cache.items()} == expected
    assert set(hook_points(make_model())) == set(expected)
    assert set(hook_points(make_model(**ROTARY))) == set(expected) - {"hook_pos_embed"}


@pytest.mark.parametrize("variant", [{}, ROTARY], ids=["learned", "rotary"])
@torch.no_grad()
def test_cached_activations_obey_the_equations(variant: dict[str, Any]) -> None:
    model = make_model(**variant)
    output, cache = run_with_cache(model, TOKENS_BT)
    stream = cache["hook_embed"] + cache.get("hook_pos_embed", 0)
    for layer, block in enumerate(model.blocks):
        at = {name: cache[f"blocks.{layer}.{name}"] for name in BLOCK_NAMES}
        assert torch.equal(at["hook_resid_pre"], stream)
        assert torch.equal(at["hook_resid_pre"] + at["hook_attn_out"], at["hook_resid_mid"])
        assert torch.equal(at["hook_resid_mid"] + at["hook_mlp_out"], at["hook_resid_post"])
        assert block.feedforward is not None
        assert block.feedforward_norm is not None
        assert block.feedforward.gate is not None
        attention_input_BTE = block.attention_norm(at["hook_resid_pre"])
        feedforward_input_BTE = block.feedforward_norm(at["hook_resid_mid"])
        silu_BTF = at["mlp.hook_pre"] * at["mlp.hook_pre"].sigmoid()
        z_BHTV = at["attn.hook_pattern"] @ at["attn.hook_v"].transpose(1, 2)
        for name, expected in {
            "attn.hook_q": (attention_input_BTE @ block.attention.query.weight.T).unflatten(-1, (3, 4)),
            "attn.hook_k": (attention_input_BTE @ block.attention.key.weight.T).unflatten(-1, (3, 4)),
            "attn.hook_v": (attention_input_BTE @ block.attention.value.weight.T).unflatten(-1, (3, 6)),
            "attn.hook_pattern": at["attn.hook_attn_scores"].softmax(-1),
            "attn.hook_z": z_BHTV.transpose(1, 2),
            "hook_attn_out": at["attn.hook_z"].flatten(2) @ block.attention.output.weight.T,
            "mlp.hook_pre": feedforward_input_BTE @ block.feedforward.gate.weight.T,
            "mlp.hook_pre_linear": feedforward_input_BTE @ block.feedforward.up.weight.T,
            "mlp.hook_post": silu_BTF * at["mlp.hook_pre_linear"],
            "hook_mlp_out": at["mlp.hook_post"] @ block.feedforward.down.weight.T,
        }.items():
            torch.testing.assert_close(at[name], expected)
        ahead_TS = torch.ones(5, 5, dtype=torch.bool).triu(1)
        assert torch.equal(at["attn.hook_attn_scores"].isneginf(), ahead_TS.expand(2, 3, 5, 5))
        if not variant:
            product = at["attn.hook_q"][0, 4, 2].dot(at["attn.hook_k"][0, 1, 2])
            torch.testing.assert_close(at["attn.hook_attn_scores"][0, 2, 4, 1], product / 2)
        stream = at["hook_resid_post"]
    scale_BT1 = (stream.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(cache["ln_final.hook_scale"], scale_BT1)
    torch.testing.assert_close(cache["ln_final.hook_normalized"], stream / scale_BT1)
    read_BTE = model.final_norm.affine(stream / scale_BT1)
    torch.testing.assert_close(output.logits, read_BTE @ model.token_embedding.weight.T)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_replacement_is_used_downstream(variant: dict[str, Any]) -> None:
    def uneven(activation: Tensor) -> Tensor:
        """Each column by another factor: a common one would vanish in the next norm."""
        return activation * torch.linspace(0.5, 2, activation.shape[-1])

    model = make_model(**variant)
    before = model(TOKENS_BT)
    for name in hook_points(model):
        with hooked(model, {name: lambda activation: activation}):
            same = model(TOKENS_BT)  # up to rounding: scores, patterns and scales have no fused kernel
        with hooked(model, {name: uneven}):
            changed = model(TOKENS_BT)
            torch.testing.assert_close(model.logits(TOKENS_BT), changed.logits)
        torch.testing.assert_close(same.logits, before.logits)
        torch.testing.assert_close(same.hidden_states, before.hidden_states)
        assert not torch.allclose(changed.logits, before.logits, atol=1e-4), name
    assert torch.equal(model(TOKENS_BT).logits, before.logits)


def test_the_output_holds_the_replaced_stream_and_pattern() -> None:
    model = make_model()
    uniform_BHTS = (torch.ones(5, 5).tril() / torch.arange(1, 6)[:, None]).expand(2, 3, 5, 5)
    with hooked(model, {"blocks.0.attn.hook_pattern": lambda _: uniform_BHTS, "blocks.1.hook_resid_pre": torch.neg}):
        output, cache = run_with_cache(model, TOKENS_BT, ["blocks.0.hook_resid_post"])
    assert torch.equal(output.attention_weights[:, 0], uniform_BHTS)
    assert torch.equal(output.hidden_states[:, 1], -cache["blocks.0.hook_resid_post"])


def test_an_error_in_the_block_removes_the_hooks_and_is_not_masked() -> None:
    model = make_model()
    with pytest.raises(ZeroDivisionError), hooked(model, {"hook_embed": torch.zeros_like}):
        raise ZeroDivisionError  # and no error about the hook that was never called
    assert all(point.hook is None for point in hook_points(model).values())


@pytest.mark.parametrize(
    ("hooks", "named"),
    [
        ({"hook_embed": torch.neg, "blocks.0.attn.hook_patern": torch.neg}, "blocks.0.attn.hook_patern"),
        ({"zzz": torch.neg}, "zzz"),
        ({"hook_embed": torch.neg}, "hook_embed"),  # never called
    ],
)
def test_refused_hooks(hooks: dict[str, Any], named: str) -> None:
    model = make_model()
    with pytest.raises(LumiereError, match=f"'{named}'") as caught, hooked(model, hooks):
        model.final_norm(torch.ones(1, 1, 8))
    if "patern" in named:
        assert "blocks.0.attn.hook_pattern" in str(caught.value.hint)


def test_functions_at_one_point_run_in_order_and_nested_blocks_add_theirs() -> None:
    model = make_model()
    _, plain = run_with_cache(model, TOKENS_BT, ["hook_embed"])
    seen: list[Tensor] = []

    def add(amount: float) -> Hook:
        return lambda activation: activation + amount

    with hooked(model, {"hook_embed": [add(1), seen.append, torch.neg]}):
        with hooked(model, {"hook_embed": [add(3), seen.append]}):
            model(TOKENS_BT)
        model(TOKENS_BT)
    before = plain["hook_embed"]
    for found, expected in zip(seen, [before + 1, 3 - (before + 1), before + 1], strict=True):
        torch.testing.assert_close(found, expected)


def test_a_pattern_names_every_point_that_it_matches() -> None:
    model = make_model()
    patterns = ["blocks.*.attn.hook_[qk]", "hook_embed"]
    names = ["hook_embed", *(f"blocks.{layer}.attn.hook_{leaf}" for layer in (0, 1) for leaf in "qk")]
    assert matching_names(model, patterns) == names
    assert list(run_with_cache(model, TOKENS_BT, patterns)[1]) == names
    with hooked(model, {"blocks.*.hook_*_out": torch.zeros_like}):
        output = model(TOKENS_BT)
    torch.testing.assert_close(output.hidden_states[:, 0], output.hidden_states[:, 2])


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("variant", [{}, ROTARY], ids=["learned", "rotary"])
def test_gradients_are_those_of_finite_differences(variant: dict[str, Any], is_frozen: bool) -> None:
    model = make_model(**variant).double().requires_grad_(not is_frozen)

    def metric(output: TransformerOutput) -> Tensor:
        return output.logits[0, -1, 3] - output.logits[0, -1, 7]

    names = ["hook_embed", "blocks.0.attn.hook_z", "blocks.1.attn.hook_pattern", "blocks.1.mlp.hook_post"]
    value, activations, gradients = run_with_gradients(model, TOKENS_BT, metric, names)
    torch.testing.assert_close(value, metric(model(TOKENS_BT)).detach())
    assert list(gradients) == list(activations) == names
    assert all(parameter.grad is None for parameter in model.parameters())
    generator = torch.Generator().manual_seed(0)
    for name in names:
        direction = 1e-5 * torch.randn(activations[name].shape, generator=generator, dtype=torch.float64)
        moved = []
        for sign in (1, -1):
            with hooked(model, {name: lambda x, change=sign * direction: x + change}):
                moved.append(metric(model(TOKENS_BT)).item())
        assert (gradients[name] * direction).sum().item() == pytest.approx((moved[0] - moved[1]) / 2, rel=1e-5)
    later = run_with_gradients(model, TOKENS_BT, lambda output: output.logits[0, 1, 3], ["blocks.1.hook_resid_pre"])[2]
    assert not later["blocks.1.hook_resid_pre"][:, 2:].any()


def test_a_replacement_of_another_shape_is_an_error() -> None:
    model = make_model()
    message = r"'blocks.0.hook_attn_out' .*\(5, 8\).*\(2, 5, 8\)"
    with pytest.raises(ValueError, match=message), hooked(model, {"blocks.0.hook_attn_out": lambda x: x[0]}):
        model(TOKENS_BT)


def test_the_cache_holds_what_is_named_in_order_and_lets_gradients_through() -> None:
    model = make_model()
    output, cache = run_with_cache(model, TOKENS_BT, ["blocks.1.hook_resid_post", "hook_embed"])
    assert list(cache) == ["hook_embed", "blocks.1.hook_resid_post"]
    assert torch.equal(cache["blocks.1.hook_resid_post"], output.hidden_states[:, 2])
    (gradient,) = torch.autograd.grad(output.logits[0, 4, 0], cache["hook_embed"])
    assert (gradient[0] != 0).all()
    assert (gradient[1] == 0).all()


def test_hooks_registered_with_torch_are_called_too() -> None:
    model = make_model()
    seen: list[str] = []
    point = model.blocks[0].attention.hook_pattern
    handles = [
        point.register_forward_hook(lambda module, inputs, output: seen.append("after")),
        point.register_forward_pre_hook(lambda module, inputs: seen.append("before")),
        point.register_full_backward_hook(lambda module, gradients, outputs: seen.append("backward")),
    ]
    model(TOKENS_BT).logits.sum().backward()
    assert seen == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model(TOKENS_BT)
    assert len(seen) == 3
