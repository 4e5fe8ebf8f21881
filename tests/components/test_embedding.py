"""The token embedding: rows in, dot products out, one weight."""

import torch

from lumiere.components.layers import TokenEmbedding


def test_rows_in_and_products_out() -> None:
    embedding = TokenEmbedding(vocab_size=3, embedding_size=2)
    with torch.no_grad():
        embedding.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, -1.0]]))
    assert embedding(torch.tensor([[2, 0]])).tolist() == [[[3.0, -1.0], [1.0, 0.0]]]
    assert embedding.unembed(torch.tensor([[[1.0, 10.0]]])).tolist() == [[[1.0, 20.0, -7.0]]]
    assert [name for name, _ in embedding.named_parameters()] == ["weight"]
