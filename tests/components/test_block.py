"""The block: which part reads what, and where dropout acts."""

import torch

from lumiere.components.kernels import visible_keys
from lumiere.components.layers import Block


def test_each_part_reads_the_normalised_stream_and_adds_to_it() -> None:
    block = Block(8, 2, 4, 4, 16, dropout=0.0).double()
    resid_BTE = torch.randn(2, 5, 8, dtype=torch.float64)
    mid_BTE = resid_BTE + block.attention(block.attention_norm(resid_BTE))
    post_BTE = mid_BTE + block.feedforward(block.feedforward_norm(mid_BTE))
    watched = block.watch(resid_BTE, visible_keys(5, resid_BTE.device))
    torch.testing.assert_close(block(resid_BTE), post_BTE)
    torch.testing.assert_close(watched.resid_post, post_BTE)
    assert watched.resid_pre is resid_BTE


def test_full_dropout_leaves_the_stream_alone_while_training() -> None:
    block = Block(8, 2, 4, 4, 16, dropout=1.0).train()
    resid_BTE = torch.randn(2, 5, 8)
    assert torch.equal(block(resid_BTE), resid_BTE)
    assert torch.equal(block.watch(resid_BTE, visible_keys(5, resid_BTE.device)).resid_post, resid_BTE)
    assert not torch.equal(block.eval()(resid_BTE), resid_BTE)
