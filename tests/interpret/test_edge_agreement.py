"""Edge attribution patching by TransformerLens, on the same weights as a stock Llama."""

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

from lumiere.interpret.edge_ablation import EdgeRuns
from lumiere.interpret.edge_attribution import edge_attribution
from lumiere.interpret.metrics import logit_difference
from lumiere.interpret.prompts import PromptPairs
from tests.models.build import ROTARY, make_model, stock_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_lens") is None,
        reason="TransformerLens is not installed: pip install -e '.[transformer-lens]'",
    ),
    pytest.mark.filterwarnings("ignore"),
]


def name_of(node: Any) -> str:
    """The name here of a writer or reader of TransformerLens."""
    if node.kind in ("embed", "logits"):
        return node.kind
    if node.kind.startswith("mlp"):
        return f"L{node.layer}.mlp"
    head = f"L{node.layer}H{node.head}"
    return head if node.kind == "attn_head_out" else f"{head}.{node.kind[0]}"


def test_every_edge_has_the_score_of_transformer_lens() -> None:
    """There an edge is at one position, here at all of them.

    Its gradient is that of the run it calls corrupt, so the two prompts change places, and the sign with them.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import (  # pyright: ignore[reportMissingImports]
        build_bridge_from_module,
    )
    from transformer_lens.tools.analysis import (  # pyright: ignore[reportMissingImports]
        EdgeAttributionConfig,
        attribution_patch,
    )

    model = make_model(**ROTARY, num_layers=3, d_value=4).double()
    llama = stock_llama(model, attn_implementation="eager").double()
    bridge = build_bridge_from_module(llama, "LlamaForCausalLM", hf_config=llama.config).eval()
    clean, corrupt = torch.tensor([[1, 4, 7, 5, 6], [3, 5, 8, 0, 1]]), torch.tensor([[1, 6, 7, 5, 4], [3, 5, 0, 8, 2]])
    ends, targets, versus = (torch.tensor(ids) for ids in ([4, 4], [5, 6], [7, 7]))
    with torch.no_grad():
        assert (bridge(clean) - model.logits(clean)).abs().max() < 1e-5
        runs = EdgeRuns(model, PromptPairs(clean, corrupt, ends, targets, versus, np.arange(2)), logit_difference)
    scores = edge_attribution(runs)
    for row in range(2):
        expected = dict.fromkeys(runs.graph.names, 0.0)
        result = attribution_patch(
            bridge,
            corrupt[row : row + 1],
            clean[row : row + 1],
            lambda logits, row=row: logits[0, -1, targets[row]] - logits[0, -1, versus[row]],
            EdgeAttributionConfig(granularity="edge"),
        )
        for (writer, reader), score in result.edge_scores.items():
            expected[name_of(writer), name_of(reader)] -= score
        assert len(expected) == runs.num_edges
        assert scores[:, row].tolist() == pytest.approx(list(expected.values()), abs=1e-5)
    assert scores.abs().max() > 1e-2
