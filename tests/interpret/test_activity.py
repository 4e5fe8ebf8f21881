"""What the parts do, against one token at a time."""

import numpy as np
import pytest
import torch

from lumiere.components.hooks import run_with_cache
from lumiere.config.loader import validate
from lumiere.data.batches import Batch
from lumiere.interpret.summary import measure_activity
from lumiere.models.transformer import Transformer, build_model
from lumiere.persistence.runs import Run

WINDOWS = [[0, 70, 71, 72, 70], [5, 9, 300, 1, 2], [80, 2, 2, 2, 2]]  # 2 is padding


@pytest.fixture(scope="module", params=["random", "trained"])
def model(request: pytest.FixtureRequest, trained_run: Run) -> Transformer:
    if request.param == "trained":
        return trained_run.load_model("best").eval()
    sizes = {"embedding_size": 12, "context_size": 16, "num_layers": 2, "num_heads": 2, "d_key": 5, "d_value": 7}
    torch.manual_seed(1)
    model = build_model(validate({"model": {**sizes, "d_ff": 9}, "tokenizer": {"vocab_size": 320}})).eval()
    for parameter in model.parameters():
        parameter.data *= 20 if parameter.ndim == 2 else 1
    return model


def batch(windows: list[list[int]]) -> Batch:
    tokens = torch.tensor(windows)
    return Batch(tokens, tokens, tokens.numel())


def test_means_are_those_of_the_tokens_one_by_one(model: Transformer) -> None:
    activity = measure_activity(model, [batch(WINDOWS)])
    writes, heads = np.zeros((model.num_layers, 2)), np.zeros((model.num_layers, model.num_heads))
    largest = np.zeros((model.num_layers, model.d_ff))
    texts = [[token for token in window if token != 2] for window in WINDOWS]
    for text in texts:
        with torch.no_grad():
            _, cache = run_with_cache(model, torch.tensor([text]))
            for layer, block in enumerate(model.blocks):
                at = {leaf.removeprefix(f"blocks.{layer}."): value[0] for leaf, value in cache.items()}
                for position in range(len(text)):
                    before = at["hook_resid_pre"][position].norm()
                    writes[layer, 0] += float(at["hook_attn_out"][position].norm() / before)
                    writes[layer, 1] += float(
                        at["hook_mlp_out"][position].norm() / at["hook_resid_mid"][position].norm()
                    )
                    for head in range(model.num_heads):
                        alone = torch.zeros(model.num_heads, model.d_value)
                        alone[head] = at["attn.hook_z"][position, head]
                        heads[layer, head] += float(block.attention.output(alone.flatten()).norm() / before)
                    largest[layer] = np.maximum(largest[layer], at["mlp.hook_post"][position].abs().numpy())
    num_tokens = sum(map(len, texts))
    assert (activity.num_windows, activity.num_tokens) == (3, num_tokens) == (3, 10)
    np.testing.assert_allclose(activity.writes, writes / num_tokens, rtol=1e-4)
    np.testing.assert_allclose(activity.head_writes, heads / num_tokens, rtol=1e-4)
    np.testing.assert_allclose(activity.largest_activations, largest, rtol=1e-4)


def test_batches_make_no_difference(model: Transformer) -> None:
    whole, parts = measure_activity(model, [batch(WINDOWS)]), measure_activity(model, [batch([w]) for w in WINDOWS])
    for name in ("writes", "head_writes", "largest_activations"):
        np.testing.assert_allclose(getattr(whole, name), getattr(parts, name), rtol=1e-4)
    assert (whole.num_windows, whole.num_tokens) == (parts.num_windows, parts.num_tokens)


def test_the_head_is_the_embedding_or_it_is_noticed(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure_activity(model, [batch(WINDOWS)]).tied_error < 1e-5
    monkeypatch.setattr(model.token_embedding, "unembed", lambda resid: resid @ model.token_embedding.weight.T * 1.01)
    assert measure_activity(model, [batch(WINDOWS)]).tied_error > 1e-3
