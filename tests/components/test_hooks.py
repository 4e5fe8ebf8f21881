"""Hook points: their names, that replacements are used, and that a `with` block leaves no trace."""

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor

from lumiere.components.hooks import HookPoint, hook_points, hooked, run_with_cache
from lumiere.errors import LumiereError
from lumiere.models.transformer import Transformer

STREAM_NAMES = ["hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"]
ATTENTION_NAMES = [
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
]
FEEDFORWARD_NAMES = ["mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"]
BLOCK_NAMES = STREAM_NAMES + ATTENTION_NAMES + FEEDFORWARD_NAMES
TOKENS_BT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def make_model(positions: Literal["learned", "rotary"] = "learned", dropout: float = 0.0) -> Transformer:
    """B = 2, T = 5, L = 2, H = 3, K = 4, V = 6, F = 10, E = 8; weights large enough that every part matters."""
    model = Transformer(11, 8, 7, 2, 3, 4, 6, 10, dropout=dropout, positions=positions).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


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


def test_names_are_those_of_transformer_lens() -> None:
    blocks = {f"blocks.{layer}.{name}" for layer in range(2) for name in BLOCK_NAMES}
    ends = {"hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized"}
    assert set(hook_points(make_model("rotary"))) == blocks | ends
    assert set(hook_points(make_model("learned"))) == blocks | ends | {"hook_pos_embed"}


def test_shapes_are_those_of_transformer_lens() -> None:
    _, cache = run_with_cache(make_model(), TOKENS_BT)
    shapes = {name: tuple(activation.shape) for name, activation in cache.items()}
    stream, heads, square, neurons = (2, 5, 8), (2, 5, 3), (2, 3, 5, 5), (2, 5, 10)
    expected = {"hook_embed": stream, "hook_pos_embed": stream}
    for layer in range(2):
        prefix = f"blocks.{layer}."
        expected |= {prefix + name: stream for name in STREAM_NAMES}
        expected |= {prefix + "attn.hook_q": (*heads, 4), prefix + "attn.hook_k": (*heads, 4)}
        expected |= {prefix + "attn.hook_v": (*heads, 6), prefix + "attn.hook_z": (*heads, 6)}
        expected |= {prefix + "attn.hook_attn_scores": square, prefix + "attn.hook_pattern": square}
        expected |= {prefix + name: neurons for name in FEEDFORWARD_NAMES}
    assert shapes == expected | {"ln_final.hook_scale": (2, 5, 1), "ln_final.hook_normalized": stream}


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@torch.no_grad()
def test_cached_activations_obey_the_equations(positions: Literal["learned", "rotary"]) -> None:
    model = make_model(positions)
    output, cache = run_with_cache(model, TOKENS_BT)
    stream = cache["hook_embed"] + cache.get("hook_pos_embed", 0)
    for layer, block in enumerate(model.blocks):
        at = {name: cache[f"blocks.{layer}.{name}"] for name in BLOCK_NAMES}
        assert torch.equal(at["hook_resid_pre"], stream)
        assert torch.equal(at["hook_resid_pre"] + at["hook_attn_out"], at["hook_resid_mid"])
        assert torch.equal(at["hook_resid_mid"] + at["hook_mlp_out"], at["hook_resid_post"])
        read_BTE = block.attention_norm(at["hook_resid_pre"])
        torch.testing.assert_close(at["attn.hook_q"].flatten(2), read_BTE @ block.attention.query.weight.T)
        torch.testing.assert_close(at["attn.hook_k"].flatten(2), read_BTE @ block.attention.key.weight.T)
        torch.testing.assert_close(at["attn.hook_v"].flatten(2), read_BTE @ block.attention.value.weight.T)
        ahead_TS = torch.ones(5, 5, dtype=torch.bool).triu(1)
        assert torch.equal(at["attn.hook_attn_scores"].isneginf(), ahead_TS.expand(2, 3, 5, 5))
        torch.testing.assert_close(at["attn.hook_pattern"], at["attn.hook_attn_scores"].softmax(-1))
        z_BHTV = at["attn.hook_pattern"] @ at["attn.hook_v"].transpose(1, 2)
        torch.testing.assert_close(at["attn.hook_z"], z_BHTV.transpose(1, 2))
        torch.testing.assert_close(at["hook_attn_out"], at["attn.hook_z"].flatten(2) @ block.attention.output.weight.T)
        read_BTE = block.feedforward_norm(at["hook_resid_mid"])
        torch.testing.assert_close(at["mlp.hook_pre"], read_BTE @ block.feedforward.gate.weight.T)
        torch.testing.assert_close(at["mlp.hook_pre_linear"], read_BTE @ block.feedforward.up.weight.T)
        silu_BTF = at["mlp.hook_pre"] * at["mlp.hook_pre"].sigmoid()
        torch.testing.assert_close(at["mlp.hook_post"], silu_BTF * at["mlp.hook_pre_linear"])
        torch.testing.assert_close(at["hook_mlp_out"], at["mlp.hook_post"] @ block.feedforward.down.weight.T)
        stream = at["hook_resid_post"]
    torch.testing.assert_close(cache["ln_final.hook_scale"], (stream.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())
    normalized_BTE = stream / cache["ln_final.hook_scale"]
    torch.testing.assert_close(cache["ln_final.hook_normalized"], normalized_BTE)
    read_BTE = normalized_BTE * model.final_norm.weight
    torch.testing.assert_close(output.logits, read_BTE @ model.token_embedding.weight.T)


def test_scores_before_the_mask_are_scaled_products_of_queries_and_keys() -> None:
    _, cache = run_with_cache(make_model(), TOKENS_BT)
    q_K, k_K = cache["blocks.1.attn.hook_q"][0, 4, 2], cache["blocks.1.attn.hook_k"][0, 1, 2]
    torch.testing.assert_close(cache["blocks.1.attn.hook_attn_scores"][0, 2, 4, 1], q_K.dot(k_K) / 2)


@pytest.mark.parametrize("name", sorted(hook_points(make_model())))
def test_every_replacement_is_used_downstream(name: str) -> None:
    def uneven(activation: Tensor) -> Tensor:
        """Each column by another factor: a common one would vanish in the next norm."""
        return activation * torch.linspace(0.5, 2, activation.shape[-1])

    model = make_model()
    before = model(TOKENS_BT)
    with hooked(model, {name: lambda activation: activation}):
        same = model(TOKENS_BT)  # up to rounding: scores, patterns and scales have no fused kernel
    with hooked(model, {name: uneven}):
        changed = model(TOKENS_BT)
    torch.testing.assert_close(same.logits, before.logits)
    torch.testing.assert_close(same.hidden_states, before.hidden_states)
    assert not torch.allclose(changed.logits, before.logits, atol=1e-4)


def test_without_the_last_attention_the_block_is_its_feedforward_part() -> None:
    model = make_model()
    with hooked(model, {"blocks.1.hook_attn_out": torch.zeros_like}):
        output = model(TOKENS_BT)
    block = model.blocks[1]
    resid_BTE = output.hidden_states[:, 1]
    post_BTE = resid_BTE + block.feedforward(block.feedforward_norm(resid_BTE))
    torch.testing.assert_close(output.hidden_states[:, 2], post_BTE)
    torch.testing.assert_close(output.logits, model.token_embedding.unembed(model.final_norm(post_BTE)))


def test_output_holds_the_replaced_stream_and_pattern() -> None:
    model = make_model()
    uniform_BHTS = (torch.ones(5, 5).tril() / torch.arange(1, 6)[:, None]).expand(2, 3, 5, 5)
    with hooked(model, {"blocks.0.attn.hook_pattern": lambda _: uniform_BHTS, "blocks.1.hook_resid_pre": torch.neg}):
        output, cache = run_with_cache(model, TOKENS_BT, ["blocks.0.hook_resid_post"])
    assert torch.equal(output.attention_weights[:, 0], uniform_BHTS)
    assert torch.equal(output.hidden_states[:, 1], -cache["blocks.0.hook_resid_post"])


def test_looking_gets_the_activation_and_changes_nothing() -> None:
    model = make_model()
    seen: list[Tensor] = []
    with hooked(model, {"blocks.1.hook_resid_post": seen.append}):
        output = model(TOKENS_BT)
    assert torch.equal(seen[0], output.hidden_states[:, 2])
    assert torch.equal(output.logits, model(TOKENS_BT).logits)


def test_hooks_are_gone_after_the_block_and_after_an_error_in_it() -> None:
    model = make_model()
    before = model(TOKENS_BT).logits
    with hooked(model, {"hook_embed": torch.zeros_like}):
        assert not torch.equal(model(TOKENS_BT).logits, before)
    assert torch.equal(model(TOKENS_BT).logits, before)
    with pytest.raises(ZeroDivisionError), hooked(model, {"hook_embed": torch.zeros_like}):
        raise ZeroDivisionError  # and no complaint about the hook that never fired
    assert torch.equal(model(TOKENS_BT).logits, before)


def test_unknown_name_gives_the_nearest() -> None:
    model = make_model()
    with pytest.raises(LumiereError, match=r"no hook point 'blocks.0.attn.hook_patern'") as caught:
        run_with_cache(model, TOKENS_BT, ["hook_embed", "blocks.0.attn.hook_patern"])
    assert "blocks.0.attn.hook_pattern" in str(caught.value.hint)
    with pytest.raises(LumiereError, match="hook_points"), hooked(model, {"zzz": torch.neg}):
        pass


def test_a_hook_that_never_fires_is_an_error() -> None:
    model = make_model()
    hooks = {"ln_final.hook_scale": torch.ones_like, "hook_embed": torch.zeros_like}
    with pytest.raises(LumiereError, match="'hook_embed'"), hooked(model, hooks):
        model.final_norm(torch.ones(1, 1, 8))


def test_every_way_through_the_model_passes_the_hooks() -> None:
    model = make_model()
    with hooked(model, {"blocks.1.hook_resid_post": torch.neg}):
        expected = model(TOKENS_BT).logits
        torch.testing.assert_close(model.logits(TOKENS_BT), expected)
    assert not torch.allclose(model.logits(TOKENS_BT), expected)


def test_a_point_takes_one_hook() -> None:
    model = make_model()
    seen: list[Tensor] = []
    with hooked(model, {"hook_embed": seen.append}):
        with pytest.raises(LumiereError, match="already has a hook"), hooked(model, {"hook_embed": torch.zeros_like}):
            pass
        model(TOKENS_BT)
    assert len(seen) == 1


def test_a_replacement_of_another_shape_is_an_error() -> None:
    model = make_model()
    hooks = {"blocks.0.hook_attn_out": lambda activation: activation[0]}
    message = r"'blocks.0.hook_attn_out' returned shape \(5, 8\) for an activation of shape \(2, 5, 8\)"
    with pytest.raises(ValueError, match=message), hooked(model, hooks):
        model(TOKENS_BT)


def test_the_cache_holds_what_is_named_in_order_and_lets_gradients_through() -> None:
    model = make_model()
    output, cache = run_with_cache(model, TOKENS_BT, ["blocks.1.hook_resid_post", "hook_embed"])
    assert list(cache) == ["hook_embed", "blocks.1.hook_resid_post"]
    (gradient,) = torch.autograd.grad(output.logits[0, 4, 0], cache["hook_embed"])
    assert (gradient[0] != 0).all()
    assert (gradient[1] == 0).all()


def test_the_stream_is_the_sum_of_its_parts_while_training_too() -> None:
    model = make_model(dropout=0.5).train()
    _, cache = run_with_cache(model, TOKENS_BT)
    attention_BTE = cache["blocks.0.hook_attn_out"]
    assert (attention_BTE == 0).any()
    assert torch.equal(cache["blocks.0.hook_resid_pre"] + attention_BTE, cache["blocks.0.hook_resid_mid"])


def test_torchs_own_hooks_fire_too() -> None:
    """A point's short cut must not pass over those that were hung on it as on any module."""
    model, seen = make_model(), []
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
