"""TransformerLens and Lumiere on the same weights: logits, activations, patterns and attribution.

Its RMSNorm computes in float32 whatever the model's type, so float64 agrees to 1e-5 only.
"""

import importlib.util
import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from lumiere.cli import app
from lumiere.components.hooks import run_with_cache
from lumiere.export.exporting import TARGETS, export_model
from lumiere.export.original import Original
from lumiere.interpret.logit_attribution import logit_attribution
from lumiere.interpret.patching import patch
from lumiere.interpret.prompts import pair_up
from lumiere.models.transformer import Transformer
from lumiere.persistence.runs import Run
from tests.export.conftest import HELD, make_original

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_lens") is None,
        reason="TransformerLens is not installed: pip install -e '.[transformer-lens]'",
    ),
    pytest.mark.filterwarnings("ignore"),  # its own, and those of what it loads
]

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4}


Pair = tuple[Transformer, Any]


@pytest.fixture(params=[*HELD, "trained"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=TOLERANCES)
def pair(request: pytest.FixtureRequest, kind: str, trained_run: Run, without_transformer_lens: None) -> Pair:
    """A model, and TransformerLens's model from its exported folder."""
    if kind == "trained":
        original = Original(trained_run.load_model("best"), trained_run.load_tokenizer(), {})
    else:
        original = make_original(**HELD[kind])
    export_model(TARGETS["transformer-lens"], Path("out"), original)
    bridge = runpy.run_path("out/load.py")["load_model"](request.param)
    return original.model.to(request.param), bridge


def tokens_for(model: Transformer) -> Tensor:
    """Two sequences as long as the context, without padding, which TransformerLens does not mask."""
    return torch.randint(3, model.vocab_size, (2, model.context_size))


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0, msg=lambda text: f"{what}: {text}")


@torch.no_grad()
def test_logits_and_every_activation(pair: Pair) -> None:
    model, bridge = pair
    size = model.settings.rotary_size
    tokens_BT = tokens_for(model)
    output, ours = run_with_cache(model, tokens_BT)
    logits, theirs = bridge.run_with_cache(tokens_BT)
    assert_same(logits, output.logits, "logits")
    hidden_TT = torch.ones(tokens_BT.shape[1], tokens_BT.shape[1], dtype=torch.bool).triu(1)
    for name, activation in ours.items():
        prefix, _, leaf = name.rpartition(".")
        if prefix == "ln_final" and model.settings.norm == "none":
            continue  # no norm has no hooks there
        found = theirs[name]
        if leaf == "hook_attn_scores":
            # In 4.3 this hook sees the pattern, so scores are computed from queries and keys.
            assert torch.equal(found, theirs[f"{prefix}.hook_pattern"]), "the hook sees scores now: simplify this test"
            if size or model.settings.key_value_heads < model.num_heads:
                continue  # rotated queries and keys have no name, nor have repeated keys; the patterns cover them
            q, k = (theirs[f"{prefix}.hook_{part}"].transpose(1, 2) for part in "qk")
            found = (q @ k.transpose(-1, -2) / model.d_key**0.5).masked_fill(hidden_TT, -torch.inf)
        if leaf in ("hook_q", "hook_k") and size:
            # Rotary pairs are neighbors there, halves here.
            turned, rest = found.tensor_split([size], dim=-1)
            found = torch.cat([turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), rest], dim=-1)
        assert_same(found, activation, name)
    for layer in range(model.num_layers):
        assert_same(theirs["pattern", layer], output.attention_weights[:, layer], f"pattern of layer {layer}")


@torch.no_grad()
def test_direct_logit_attribution(pair: Pair) -> None:
    """Compare what each part adds to the difference of two logits with `lumiere inspect logits`."""
    from transformer_lens.tools.analysis import direct_logit_attribution  # pyright: ignore[reportMissingImports]

    model, bridge = pair
    tokens_BT = tokens_for(model)[:1]
    bridge.enable_compatibility_mode()
    target, other = model(tokens_BT).logits[0, -1].topk(2).indices.tolist()
    found = logit_attribution(model, tokens_BT[0].tolist(), target=target, versus=other)
    ours = {"embed": found.embed[0]}
    if found.pos_embed is not None:
        ours["pos_embed"] = found.pos_embed[0]
    for layer in range(model.num_layers):
        ours[f"{layer}_attn_out"] = found.attention[0, layer]
        if model.settings.feedforward != "none":
            ours[f"{layer}_mlp_out"] = found.feedforward[0, layer]
        if model.settings.bias == "none":  # compatibility mode moves the values' biases from heads to the output
            ours |= {f"L{layer}H{head}": value for head, value in enumerate(found.heads[0, layer])}
    assert found.holds

    theirs: dict[str, float] = {}
    for unit in ("component", "head"):
        parts = direct_logit_attribution(bridge, tokens_BT, target, other, unit=unit)
        theirs |= dict(zip(parts.labels, parts.attribution.flatten().tolist(), strict=True))
    missing = ours.keys() - theirs.keys()
    assert not missing, f"{missing} in {list(theirs)}"
    for label, value in ours.items():
        assert theirs[label] == pytest.approx(value, abs=TOLERANCES[model.token_embedding.weight.dtype]), label


@torch.no_grad()
def test_activation_patching(pair: Pair) -> None:
    """The streams, both outputs and the heads' q, k, v and z at every position, and patterns."""
    from transformer_lens import patching  # pyright: ignore[reportMissingImports]

    model, bridge = pair
    if next(model.parameters()).dtype == torch.float32:
        pytest.skip("the agreement is about float64")
    clean, corrupt = (tokens[None] for tokens in tokens_for(model))
    pairs = pair_up(clean.tolist(), corrupt.tolist(), [3], [4])
    _, cache = bridge.run_with_cache(clean)
    sweeps = {
        ("resid_pre", "position"): patching.get_act_patch_resid_pre,
        ("resid_mid", "position"): patching.get_act_patch_resid_mid,
        ("attn_out", "position"): patching.get_act_patch_attn_out,
        ("mlp_out", "position"): patching.get_act_patch_mlp_out,
        ("q", "both"): patching.get_act_patch_attn_head_q_by_pos,
        ("k", "both"): patching.get_act_patch_attn_head_k_by_pos,
        ("v", "both"): patching.get_act_patch_attn_head_v_by_pos,
        ("z", "both"): patching.get_act_patch_attn_head_out_by_pos,
        ("z", "unit"): patching.get_act_patch_attn_head_out_all_pos,
        ("pattern", "unit"): patching.get_act_patch_attn_head_pattern_all_pos,
    }
    has_groups = model.settings.key_value_heads != model.num_heads
    for (site, by), sweep in sweeps.items():
        if (site in ("resid_mid", "mlp_out") and model.settings.feedforward == "none") or (site in "kv" and has_groups):
            continue
        ours = torch.from_numpy(patch(model, pairs, site, by).patched[..., 0])
        theirs = sweep(bridge, corrupt, cache, lambda logits: logits[0, -1, 3] - logits[0, -1, 4])
        if by == "both":
            theirs = theirs.transpose(1, 2)  # (L, T, H) there
        assert_same(theirs.double(), ours.view(theirs.shape), f"{site} by {by}")


def test_the_command_lets_the_library_check(trained_run: Run) -> None:
    options = ["--to", "transformer-lens", "--runs-dir", str(trained_run.path.parent)]
    result = CliRunner().invoke(app, ["export", trained_run.id, "out", *options])
    assert result.exit_code == 0, result.output
    assert "the same logits in TransformerLens 4" in result.stdout.replace("\n", " ")
    assert sorted(os.listdir("out"))[-1] == "tokenizer.json", "no bytecode is left"
