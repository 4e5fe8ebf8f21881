"""The graph of writers and readers, counted by hand and by others."""

from typing import Any

import pytest
import torch

from lumiere.interpret.edges import count_edges, edge_graph, writes_of
from lumiere.models.transformer import Transformer
from tests.models.build import VARIANTS, make_model

GRAPHS: list[tuple[int, dict[str, Any]]] = [
    # Two layers of four heads, attention only, embedding and positions as one: (4 + 2 * 4) * (1 + 5) + 9.
    (81, {"num_layers": 2, "num_heads": 4, "feedforward": "none", "positions": "rotary"}),
    (532, {"num_layers": 4, "num_heads": 4}),
    (3_628, {"num_layers": 6, "num_heads": 8, "positions": "rotary"}),
    # GPT-2 small, where Conmy et al. 2023 count about 32,000; and SmolLM2-135M.
    (32_491, {"num_layers": 12, "num_heads": 12, "positions": "rotary"}),
    (70_651, {"num_layers": 30, "num_heads": 9, "num_key_value_heads": 3, "positions": "rotary"}),
]


@pytest.mark.parametrize(("number", "settings"), GRAPHS)
def test_the_number_of_edges(number: int, settings: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = Transformer(vocab_size=5, embedding_size=4, context_size=4, d_key=2, d_value=2, d_ff=2, **settings)
    assert count_edges(model) == number
    assert len(set(edge_graph(model).names)) == number


def test_a_parallel_block_has_no_edge_from_its_heads_to_its_feedforward_part() -> None:
    names = set(edge_graph(make_model(**VARIANTS["gpt neox"])).names)
    assert ("L0H1", "L0.mlp") not in names
    assert {("L0H1", "L1.mlp"), ("embed", "L0.mlp"), ("L0.mlp", "L1H2.k")} <= names
    assert ("L0H1", "L0.mlp") in edge_graph(make_model()).names


def test_keys_and_values_of_a_group_have_one_reader() -> None:
    readers = [reader.name for reader in edge_graph(make_model(**VARIANTS["grouped queries"])).readers]
    assert readers[:6] == [f"L0H{head}.q" for head in range(6)]
    assert readers[6:11] == ["L0G0.k", "L0G1.k", "L0G0.v", "L0G1.v", "L0.mlp"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_writes_and_the_biases_add_up_to_the_stream(variant: str) -> None:
    model = make_model(**VARIANTS[variant]).double()
    tokens = torch.tensor([[1, 4, 7, 2, 2], [3, 5, 8, 0, 1]])
    with torch.no_grad():
        total = writes_of(model, tokens).sum(0)
        for block in model.blocks:
            if block.attention.output.bias is not None:
                total = total + block.attention.output.bias
        stream = model(tokens).residuals[-1]
    assert (total - stream).abs().max() < 1e-12
