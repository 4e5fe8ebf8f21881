"""The model against an independent numpy one, a stock Llama, and the laws it must obey."""

import math
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere.components.hooks import run_with_cache
from lumiere.components.layers import Dropout
from lumiere.config.loader import validate
from lumiere.models.transformer import PADDING_ID, Transformer, build_model
from tests import reference

Positions = Literal["learned", "rotary"]
BOTH = pytest.mark.parametrize("positions", get_args(Positions))
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


def make_model(positions: Positions = "learned", **changes: Any) -> Transformer:
    """A small model whose d_value is not its d_key, with weights large enough that every part matters."""
    sizes = {
        "vocab_size": 13,
        "embedding_size": 12,
        "context_size": 9,
        "num_layers": 2,
        "num_heads": 3,
        "d_key": 4,
        "d_value": 5,
        "d_ff": 20,
        "dropout": 0.0,
    }
    model = Transformer(**(sizes | changes), positions=positions).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def random_tokens(*shape: int) -> Tensor:
    """Ids of real tokens: 3 and above."""
    return torch.randint(3, 13, shape)


# --- against independent implementations ------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_numpy_reference(positions: Positions, dtype: torch.dtype, tolerance: float) -> None:
    model = make_model(positions).to(dtype)
    tokens_BT = random_tokens(3, 9)
    real_BT = torch.tensor([[True] * 9, [False] * 3 + [True] * 6, [True] * 7 + [False] * 2])
    output = model(tokens_BT, real_BT)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    for row in range(3):
        expected = reference.transformer(
            weights, tokens_BT[row].tolist(), 3, rotary=positions == "rotary", real=real_BT[row].tolist()
        )
        found = (output.logits[row], output.attention_weights[row], output.hidden_states[row])
        for tensor, array in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor.detach(), torch.from_numpy(array), rtol=0, atol=tolerance)


def test_rotary_model_is_a_stock_llama() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = make_model("rotary", d_value=4, context_size=32)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=13,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=4,
            max_position_embeddings=32,
            rms_norm_eps=1e-6,
            hidden_act="silu",
            attention_bias=False,
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    ).eval()
    names = {
        "token_embedding": "model.embed_tokens",
        "final_norm": "model.norm",
        "attention_norm": "input_layernorm",
        "feedforward_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "feedforward.gate": "mlp.gate_proj",
        "feedforward.up": "mlp.up_proj",
        "feedforward.down": "mlp.down_proj",
    }

    def llama_name(name: str) -> str:
        if name.startswith("blocks."):
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            return f"model.layers.{layer}.{names[part]}.weight"
        return f"{names[name.removesuffix('.weight')]}.weight"

    weights = {llama_name(name): value for name, value in model.state_dict().items()}
    problems = llama.load_state_dict(weights, strict=False)
    assert problems.missing_keys == ["lm_head.weight"]
    assert problems.unexpected_keys == []

    tokens_BT = random_tokens(2, 32)
    with torch.no_grad():
        ours = model(tokens_BT)
        theirs = llama(tokens_BT, output_attentions=True)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.logits(tokens_BT), theirs.logits, rtol=0, atol=1e-5)
        patterns = torch.stack(theirs.attentions, dim=1)
        torch.testing.assert_close(ours.attention_weights, patterns, rtol=0, atol=1e-5)


@BOTH
def test_gradients_of_the_loss_are_finite_differences(positions: Positions) -> None:
    model = make_model(positions, vocab_size=5, embedding_size=4, num_heads=2, d_key=2, d_value=3, d_ff=3).double()
    tokens_BT = torch.tensor([[1, 4, 2, 2], [0, 3, 1, 4]])
    names, values = zip(*((name, value.detach()) for name, value in model.named_parameters()), strict=True)

    class Loss(torch.nn.Module):
        """Both paths at once, so that a gradient missing from either shows."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            fast = F.cross_entropy(self.model.logits(tokens_BT).flatten(0, 1), tokens_BT.roll(-1).flatten())
            watched = F.cross_entropy(self.model(tokens_BT).logits.flatten(0, 1), tokens_BT.flatten())
            return fast + watched

    def loss(*parameters: Tensor) -> Tensor:
        replaced = {f"model.{name}": parameter for name, parameter in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Loss(), replaced, ())

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
    assert (built.vocab_size, built.d_ff, built.positions) == (300, 7, "rotary")
    assert built.padding_id == PADDING_ID
    assert {module.rate for module in built.modules() if isinstance(module, Dropout)} == {0.25}
    assert built.blocks[2].feedforward.down.weight.shape == (24, 7)


def test_initial_weights_have_the_spread_they_should() -> None:
    for name, value in Transformer(**CARD).named_parameters():
        if value.ndim == 1:
            assert torch.equal(value, torch.ones(128)), name
        else:
            expected = 0.02 / math.sqrt(8) if name.endswith(("output.weight", "down.weight")) else 0.02
            assert value.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(value.mean().item()) < expected / 20, name


def test_zero_outputs_leave_the_stream_alone_and_the_other_weights_as_they_are() -> None:
    torch.manual_seed(3)
    plain = Transformer(**CARD)
    torch.manual_seed(3)
    model = Transformer(**CARD, zero_output_init=True)
    for (name, value), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        is_output = name.endswith(("attention.output.weight", "feedforward.down.weight"))
        assert torch.equal(value, torch.zeros_like(value) if is_output else other), name
    states = model(random_tokens(2, 9)).hidden_states
    assert torch.equal(states[:, 0], states[:, -1])


@BOTH
def test_first_loss_is_that_of_a_uniform_guess(positions: Positions) -> None:
    model = Transformer(**CARD, positions=positions)
    tokens_BT = torch.randint(4096, (4, 65))
    loss = F.cross_entropy(model.logits(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(4096), abs=0.05)


# --- laws -------------------------------------------------------------------------------------------------------------


@BOTH
def test_a_token_acts_on_itself_and_on_what_follows_only(positions: Positions) -> None:
    model = make_model(positions)
    tokens_BT = random_tokens(1, 9)
    changed_BT = tokens_BT.clone()
    changed_BT[0, 4] = (changed_BT[0, 4] + 1) % 13
    before, after = model(tokens_BT), model(changed_BT)
    assert torch.equal(before.logits[:, :4], after.logits[:, :4])
    assert torch.equal(before.attention_weights[..., :4, :], after.attention_weights[..., :4, :])
    assert torch.equal(before.hidden_states[:, :, :4], after.hidden_states[:, :, :4])
    assert (before.logits[:, 4:] != after.logits[:, 4:]).any(dim=-1).all()
    torch.testing.assert_close(model.logits(tokens_BT)[:, :4], model.logits(changed_BT)[:, :4], rtol=0, atol=1e-6)


@BOTH
def test_attention_rows_sum_to_one_and_never_look_ahead(positions: Positions) -> None:
    model = make_model(positions, dropout=0.5, padding_id=2).train()
    tokens_BT = random_tokens(2, 9)
    tokens_BT[0, :3] = 2
    weights_BLHTS = model(tokens_BT).attention_weights
    assert weights_BLHTS.shape == (2, 2, 3, 9, 9)
    torch.testing.assert_close(weights_BLHTS.sum(-1), torch.ones(2, 2, 3, 9))
    assert (weights_BLHTS.triu(1) == 0).all()
    assert (weights_BLHTS[0, :, :, 3:, :3] == 0).all()
    assert (weights_BLHTS[1].tril() > 0).equal(torch.ones(2, 3, 9, 9).tril() > 0)


@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_fast_path_is_the_watching_path(positions: Positions, dtype: torch.dtype, tolerance: float) -> None:
    model = make_model(positions, padding_id=2).to(dtype)
    tokens_BT = random_tokens(2, 9)
    tokens_BT[1, 6:] = 2
    real_BT = tokens_BT != 2
    watched, fast = model(tokens_BT).logits[real_BT], model.logits(tokens_BT)[real_BT]
    torch.testing.assert_close(fast, watched, rtol=0, atol=tolerance)
    residual_BTE = model.final_residual(tokens_BT)
    assert torch.equal(model.logits(tokens_BT), residual_BTE @ model.token_embedding.weight.T)


def test_the_paths_agree_on_a_long_context() -> None:
    model = make_model("rotary", context_size=512).double()
    tokens_BT = random_tokens(1, 512)
    torch.testing.assert_close(model.logits(tokens_BT), model(tokens_BT).logits, rtol=0, atol=1e-11)


@BOTH
def test_the_rest_of_the_model_continues_from_any_block(positions: Positions) -> None:
    model = make_model(positions).eval()
    tokens_BT = torch.tensor([[3, 4, 5, 6, 3], [7, 3, 3, 9, 11]])
    with torch.no_grad():
        whole_BTE = model.final_residual(tokens_BT)
        for layer, resid_BTE in enumerate(model(tokens_BT).hidden_states.unbind(1)):
            torch.testing.assert_close(model.continue_from(resid_BTE, layer), whole_BTE)


@BOTH
def test_a_mask_and_the_padding_id_say_the_same(positions: Positions) -> None:
    model = make_model(positions, padding_id=2)
    tokens_BT = random_tokens(1, 9)
    tokens_BT[0, :4] = 2
    assert torch.equal(model(tokens_BT).logits, model(tokens_BT, tokens_BT != 2).logits)
    everything_real = torch.ones_like(tokens_BT, dtype=torch.bool)
    assert not torch.allclose(model(tokens_BT).logits, model(tokens_BT, everything_real).logits)


def test_left_padding_changes_nothing_where_positions_are_relative() -> None:
    model = make_model("rotary", padding_id=2).double()
    tokens_BT = random_tokens(1, 5)
    padded_BT = F.pad(tokens_BT, (4, 0), value=2)
    output = model(padded_BT)
    assert output.logits.isfinite().all()
    torch.testing.assert_close(output.logits[:, 4:], model(tokens_BT).logits, rtol=0, atol=1e-12)


def test_left_padding_gives_finite_gradients() -> None:
    model = make_model(padding_id=2)
    model(F.pad(random_tokens(1, 5), (4, 0), value=2)).logits.sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


# --- dropout ----------------------------------------------------------------------------------------------------------


@BOTH
def test_dropout_follows_the_seed_and_is_the_same_on_both_paths(positions: Positions) -> None:
    model = make_model(positions, dropout=0.5).train()
    tokens_BT = random_tokens(2, 9)

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.logits(tokens_BT)

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.allclose(seeded(1), seeded(2))
    fast = seeded(1)
    torch.manual_seed(1)
    torch.testing.assert_close(model(tokens_BT).logits, fast, rtol=0, atol=1e-5)


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


def test_without_dropout_training_is_evaluation() -> None:
    model = make_model(dropout=0.0)
    tokens_BT = random_tokens(2, 9)
    evaluated = model(tokens_BT)
    trained = model.train()(tokens_BT)
    assert torch.equal(evaluated.logits, trained.logits)
    assert torch.equal(evaluated.hidden_states, trained.hidden_states)


# --- learning and errors ----------------------------------------------------------------------------------------------


@BOTH
def test_overfits_one_batch(positions: Positions) -> None:
    sizes = {"embedding_size": 32, "context_size": 12, "num_layers": 2, "num_heads": 2, "d_key": 16, "d_value": 16}
    model = Transformer(vocab_size=20, **sizes, d_ff=64, dropout=0.0, positions=positions)
    tokens_BT = torch.randint(20, (4, 13))
    tokens_BT[:, 0] = torch.arange(4)  # or the first prediction could not tell the rows apart
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses: list[float] = []
    for _ in range(100):
        loss = F.cross_entropy(model.logits(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.5
    assert losses[-1] < 0.05


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
    for path in (model, model.logits, model.final_residual):
        with pytest.raises(ValueError, match=message):
            path(tokens_BT)


def test_masks_that_do_not_fit() -> None:
    model, tokens_BT = make_model(), random_tokens(2, 5)
    with pytest.raises(ValueError, match=r"shape \(2, 4\), the tokens \(2, 5\)"):
        model(tokens_BT, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch.bool, not torch.int64"):
        model(tokens_BT, torch.ones(2, 5, dtype=torch.int64))


def test_positions_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="'learned' or 'rotary', not 'sinusoidal'"):
        make_model("sinusoidal")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="even, not 3"):
        make_model("rotary", d_key=3)


def test_int32_tokens_are_tokens() -> None:
    model, tokens_BT = make_model(), random_tokens(2, 5)
    assert torch.equal(model.logits(tokens_BT.int()), model.logits(tokens_BT))


@BOTH
def test_the_fast_path_compiles_whole(positions: Positions) -> None:
    model = make_model(positions)
    tokens_BT = random_tokens(2, 9)
    compiled = torch.compile(model.logits, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens_BT), model.logits(tokens_BT))
