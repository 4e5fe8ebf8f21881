"""The model against an independent numpy one, a stock Llama, and the invariants it must obey."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere.components.hooks import run_with_cache
from lumiere.components.layers import Dropout
from lumiere.config.loader import validate
from lumiere.models.transformer import PADDING_ID, Transformer, build_model
from tests import reference
from tests.models.build import ROTARY, VARIANTS, make_model, stock_llama

VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
BOTH = pytest.mark.parametrize("variant", [{}, ROTARY], ids=["learned", "rotary"])
Variant = dict[str, Any]
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CARD: dict[str, Any] = {
    "vocab_size": 4096,
    "embedding_size": 128,
    "context_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "d_key": 32,
    "d_value": 32,
    "d_ff": 256,
}


def random_tokens(*shape: int) -> Tensor:
    """Ids of real tokens: 3 and above."""
    return torch.randint(3, 13, shape)


# --- against independent implementations ------------------------------------------------------------------------------


@VARIANT
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_numpy_reference(variant: Variant, dtype: torch.dtype, tolerance: float) -> None:
    model = make_model(**variant).to(dtype)
    tokens_BT = random_tokens(3, 9)
    real_BT = torch.tensor([[True] * 9, [False] * 3 + [True] * 6, [True] * 7 + [False] * 2])
    output = model(tokens_BT, real_BT)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    for row in range(3):
        expected = reference.transformer(weights, tokens_BT[row].tolist(), model.settings, real_BT[row].tolist())
        found = (output.logits[row], output.attention_weights[row], output.hidden_states[row])
        for tensor, array in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor.detach(), torch.from_numpy(array), rtol=0, atol=tolerance)


@torch.no_grad()
def test_a_rotary_model_is_a_stock_llama() -> None:
    model, tokens_BT = make_model(**ROTARY, d_value=4, context_size=32), random_tokens(2, 32)
    theirs = stock_llama(model, attn_implementation="eager")(tokens_BT, output_attentions=True)
    output = model(tokens_BT)
    torch.testing.assert_close(output.logits, theirs.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.attention_weights, torch.stack(theirs.attentions, dim=1), rtol=0, atol=1e-5)


@VARIANT
def test_gradients_of_the_loss_are_finite_differences(variant: Variant) -> None:
    sizes = {"vocab_size": 5, "embedding_size": 4, "num_heads": 2, "d_key": 4, "d_value": 3, "d_ff": 3}
    model = make_model(**(sizes | variant)).double()
    tokens_BT = torch.tensor([[1, 4, 2, 2], [0, 3, 1, 4]])
    names, values = zip(*((name, value.detach()) for name, value in model.named_parameters()), strict=True)

    def loss(*parameters: Tensor) -> Tensor:
        weights = dict(zip(names, parameters, strict=True))
        logits_BTV = torch.func.functional_call(model, weights, (tokens_BT,)).logits
        return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.roll(-1).flatten())

    assert torch.autograd.gradcheck(loss, [value.clone().requires_grad_() for value in values], fast_mode=True)


# --- sizes and names --------------------------------------------------------------------------------------------------


def test_the_card_has_1_188_992_parameters() -> None:
    assert Transformer(**CARD).num_parameters == 1_188_992
    assert Transformer(**CARD, positions="rotary").num_parameters == 1_188_992 - 64 * 128


def test_state_dict_keys_are_a_contract() -> None:
    golden = (GOLDEN / "state_dict_keys.txt").read_text().splitlines()
    state = Transformer(**CARD).state_dict()
    assert [f"{name} {tuple(value.shape)}" for name, value in state.items()] == golden
    rotary = Transformer(**CARD, positions="rotary").state_dict()
    assert list(rotary) == [name for name in state if name != "position_embedding.weight"]


def test_build_model_follows_the_config() -> None:
    sizes = {"embedding_size": 24, "context_size": 10, "num_layers": 3, "num_heads": 2, "d_key": 6, "d_value": 4}
    model = {**sizes, "d_ff": 7, "dropout": 0.25, "positions": "rotary"}
    built = build_model(validate({"model": model, "tokenizer": {"vocab_size": 300}}))
    assert {name: getattr(built, name) for name in sizes} == sizes
    assert (built.vocab_size, built.d_ff, built.settings.positions) == (300, 7, "rotary")
    assert built.padding_id == PADDING_ID
    assert {module.rate for module in built.modules() if isinstance(module, Dropout)} == {0.25}
    assert built.get_parameter("blocks.2.feedforward.down.weight").shape == (24, 7)


def test_initial_weights_have_the_spread_they_should() -> None:
    torch.manual_seed(3)
    plain = Transformer(**CARD)
    torch.manual_seed(3)
    zeroed = Transformer(**CARD, zero_output_init=True)
    for (name, value), other in zip(plain.named_parameters(), zeroed.parameters(), strict=True):
        is_output = name.endswith(("attention.output.weight", "feedforward.down.weight"))
        assert torch.equal(other, torch.zeros_like(value) if is_output else value), name
        if value.ndim == 1:
            assert torch.equal(value, torch.ones(128)), name
        else:
            expected = 0.02 / math.sqrt(8) if is_output else 0.02
            assert value.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(value.mean().item()) < expected / 20, name
    states = zeroed(random_tokens(2, 9)).hidden_states
    assert torch.equal(states[:, 0], states[:, -1])


# --- invariants -------------------------------------------------------------------------------------------------------


@VARIANT
def test_a_token_acts_only_on_itself_and_what_follows(variant: Variant) -> None:
    model = make_model(**variant)
    tokens_BT = random_tokens(1, 9)
    changed_BT = tokens_BT.clone()
    changed_BT[0, 4] = (changed_BT[0, 4] + 1) % 13
    before, after = model(tokens_BT), model(changed_BT)
    assert torch.equal(before.logits[:, :4], after.logits[:, :4])
    assert torch.equal(before.attention_weights[..., :4, :], after.attention_weights[..., :4, :])
    assert torch.equal(before.hidden_states[:, :, :4], after.hidden_states[:, :, :4])
    reach = 9 if None in model.windows else 1 + sum(window - 1 for window in model.windows if window is not None)
    is_changed_T = (before.logits != after.logits).any(dim=-1)[0]
    assert is_changed_T.tolist() == [4 <= position < 4 + reach for position in range(9)]


@BOTH
def test_attention_rows_sum_to_one_and_never_look_ahead(variant: Variant) -> None:
    model = make_model(**variant, dropout=0.5, padding_id=2).train()
    tokens_BT = random_tokens(2, 9)
    tokens_BT[0, :3] = 2
    weights_BLHTS = model(tokens_BT).attention_weights
    assert weights_BLHTS.shape == (2, 2, 3, 9, 9)
    torch.testing.assert_close(weights_BLHTS.sum(-1), torch.ones(2, 2, 3, 9))
    assert (weights_BLHTS.triu(1) == 0).all()
    assert (weights_BLHTS[0, :, :, 3:, :3] == 0).all()
    assert (weights_BLHTS[1].tril() > 0).equal(torch.ones(2, 3, 9, 9).tril() > 0)


@VARIANT
def test_padding_on_the_right_needs_no_mask_and_any_block_can_be_the_first(variant: Variant) -> None:
    model = make_model(**variant, padding_id=2).double()
    tokens_BT = random_tokens(2, 9)
    tokens_BT[1, 6:] = 2
    real_BT = tokens_BT != 2
    with torch.no_grad():
        output, whole_BTE = model(tokens_BT), model.final_residual(tokens_BT)
        assert torch.equal(model.logits(tokens_BT), whole_BTE @ model.unembedding.T)
        torch.testing.assert_close(model.logits(tokens_BT)[real_BT], output.logits[real_BT], rtol=0, atol=1e-12)
        for layer, resid_BTE in enumerate(output.hidden_states.unbind(1)):
            torch.testing.assert_close(model.continue_from(resid_BTE, layer)[real_BT], whole_BTE[real_BT])


@BOTH
def test_a_mask_and_the_padding_id_say_the_same(variant: Variant) -> None:
    model = make_model(**variant, padding_id=2)
    tokens_BT = F.pad(random_tokens(1, 5), (4, 0), value=2)
    assert torch.equal(model(tokens_BT).logits, model(tokens_BT, tokens_BT != 2).logits)
    everything_real = torch.ones_like(tokens_BT, dtype=torch.bool)
    assert not torch.allclose(model(tokens_BT).logits, model(tokens_BT, everything_real).logits)


def test_left_padding_changes_nothing_where_positions_are_relative() -> None:
    model = make_model(**ROTARY, padding_id=2).double()
    tokens_BT = random_tokens(1, 5)
    logits_BTV = model(F.pad(tokens_BT, (4, 0), value=2)).logits
    torch.testing.assert_close(logits_BTV[:, 4:], model(tokens_BT).logits, rtol=0, atol=1e-12)
    logits_BTV.sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_acts_on_the_embedding_sum_and_on_each_parts_output() -> None:
    model = make_model(dropout=0.5).train()
    output, cache = run_with_cache(model, random_tokens(2, 9))
    sum_BTE = cache["hook_embed"] + cache["hook_pos_embed"]
    embedding_BTE = output.hidden_states[:, 0]
    torch.testing.assert_close(embedding_BTE, torch.where(embedding_BTE == 0, 0.0, 2 * sum_BTE))
    dropped = {name for name, activation in cache.items() if 0.3 < (activation == 0).float().mean() < 0.7}
    parts = {f"blocks.{layer}.{name}" for layer in range(2) for name in ("hook_attn_out", "hook_mlp_out")}
    masked = {f"blocks.{layer}.attn.hook_pattern" for layer in range(2)}  # the future, not dropout
    assert dropped == parts | masked | {"blocks.0.hook_resid_pre"}


# --- learning and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens_BT", "message"),
    [
        (torch.zeros(1, 10, dtype=torch.int64), "1 to 9 tokens, not 10"),
        (torch.zeros(1, 0, dtype=torch.int64), "1 to 9 tokens, not 0"),
        (torch.zeros(5, dtype=torch.int64), "2 axes .* not 1"),
        (torch.zeros(1, 5), r"torch.int64 or torch.int32, not torch.float32"),
    ],
)
def test_tokens_that_do_not_fit(tokens_BT: Tensor, message: str) -> None:
    model = make_model()
    for call in (model, model.logits, model.final_residual):
        with pytest.raises(ValueError, match=message):
            call(tokens_BT)


def test_other_arguments_that_do_not_fit() -> None:
    model, tokens_BT = make_model(), random_tokens(2, 5)
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 5\)"):
        model(tokens_BT, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch.bool, not torch.int64"):
        model(tokens_BT, torch.ones(2, 5, dtype=torch.int64))
    for wrong, name in (
        ({"positions": "absolute"}, "positions"),
        ({"layers": 3}, "layers"),
        (ROTARY | {"d_key": 3}, "d_key"),
        (ROTARY | {"rotary_fraction": 0.25}, "rotary_fraction"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"attention_windows": [4]}, "attention_windows"),
    ):
        with pytest.raises(ValueError, match=name):
            make_model(**wrong)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, id=name, marks=[pytest.mark.slow] * (name != "gpt neox"))
        for name, variant in VARIANTS.items()
    ],
)
def test_the_forward_pass_compiles_whole_and_takes_int32(variant: Variant) -> None:
    torch._dynamo.reset()  # or each variant would count as a recompilation of the same code
    model, tokens_BT = make_model(**variant), random_tokens(2, 9)
    compiled = torch.compile(model.logits, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens_BT.int()), model.logits(tokens_BT))
