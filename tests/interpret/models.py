"""Models and texts of the tests: small, with weights that make every part matter and sizes that all differ."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch

from lumiere.components.kernels import IGNORED
from lumiere.config.loader import validate
from lumiere.data.batches import Batch
from lumiere.data.tokenizer import EOT, PAD, SOT
from lumiere.interpret.head_scores import TextWindows
from lumiere.models.transformer import Transformer, build_model

TOKENS = [0, 70, 71, 72, 70, 71, 9, 300, 4, 1]
SIZES = {"embedding_size": 12, "context_size": 16, "num_layers": 3, "num_heads": 2, "d_key": 6, "d_value": 7, "d_ff": 9}


def untrained_model(vocab_size: int = 320, **changes: Any) -> Transformer:
    """A fresh model in evaluation mode, whose heads attend almost uniformly."""
    torch.manual_seed(0)
    settings = {"model": {"context_size": 16, **changes}, "dataset": {"sliding_window_size": 0}}
    return build_model(validate({**settings, "tokenizer": {"vocab_size": vocab_size}})).eval()


def random_model(seed: int = 1, vocab_size: int = 320, scale: float = 15, **changes: Any) -> Transformer:
    """Large weights, so that heads attend somewhere, and gains other than 1; in evaluation mode, with dropout set."""
    model = untrained_model(vocab_size, **{**SIZES, "dropout": 0.5, **changes})
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.02 * scale if parameter.ndim == 2 else parameter.data
        parameter.data *= 1 if parameter.ndim == 2 else 1 + torch.rand_like(parameter)
    return model


def exact(model: Transformer) -> Transformer:
    """A copy in float64."""
    return deepcopy(model).double()


def nudged(model: Transformer, size: float = 0.3) -> Transformer:
    """A copy with noise on all weights."""
    torch.manual_seed(7)
    other = deepcopy(model)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape).to(parameter)  # the same in both precisions
        parameter.data += size * parameter.std().nan_to_num(0) * noise
    return other


def permuted(model: Transformer, orders: Sequence[Sequence[int]]) -> Transformer:
    """The same function with the heads of each layer in another order: head h is the old one's `order[h]`."""
    other = deepcopy(model)
    for block, order in zip(other.blocks, orders, strict=True):
        attention = block.attention
        for part in (attention.query, attention.key, attention.value):
            part.weight.data = part.weight.data.unflatten(0, (model.num_heads, -1))[list(order)].flatten(0, 1)
        heads = attention.output.weight.data.unflatten(1, (model.num_heads, -1))
        attention.output.weight.data = heads[:, list(order)].flatten(1, 2)
    return other


def rebased(model: Transformer) -> Transformer:
    """The same function with other coordinates of keys and values: Q M and K M^-T, V N and N^-1 O, for head 0."""
    other, generator = deepcopy(model), torch.Generator().manual_seed(0)
    k, v = model.d_key, model.d_value
    keys, values = (torch.randn(size, size, generator=generator).to(model.token_embedding.weight) for size in (k, v))
    for block in other.blocks:
        attention = block.attention
        attention.query.weight.data[:k] = keys @ attention.query.weight.data[:k]
        attention.key.weight.data[:k] = keys.inverse().T @ attention.key.weight.data[:k]
        attention.value.weight.data[:v] = values @ attention.value.weight.data[:v]
        attention.output.weight.data[:, :v] = attention.output.weight.data[:, :v] @ values.inverse()
    return other


def circuits(model: Transformer, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """W_V W_O and W_Q W_K^T of a head as whole matrices for row vectors, its norm's gain in what reads."""
    attention, gain = (
        model.blocks[layer].attention,
        torch.diag(model.blocks[layer].attention_norm.get_parameter("weight")),
    )
    keys, values = (slice(head * width, (head + 1) * width) for width in (model.d_key, model.d_value))
    ov = gain @ attention.value.weight[values].T @ attention.output.weight[:, values].T
    qk = gain @ attention.query.weight[keys].T @ attention.key.weight[keys] @ gain
    return ov.detach().double().numpy(), qk.detach().double().numpy()


def batch_of(lengths: Sequence[int], seed: int = 0, width: int = 10) -> Batch:
    """Random sequences, padded on the right to `width` tokens and one target more."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 300, (len(lengths), width + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for row, length in enumerate(lengths):
        tokens[row, length:] = PAD
        targets[row, length - 1 :] = IGNORED
    num_targets = int((targets != IGNORED).sum())
    return Batch(tokens[:, :-1].contiguous(), targets, num_targets, lengths=np.array(lengths))


def one_row(batch: Batch, row: int) -> Batch:
    """One sequence of a padded batch."""
    assert batch.lengths is not None
    part = slice(row, row + 1)
    num_targets = int((batch.targets[row] != IGNORED).sum())
    return Batch(batch.tokens[part], batch.targets[part], num_targets, lengths=batch.lengths[part])


def text_windows(windows_NT: torch.Tensor, documents_N: np.ndarray) -> TextWindows:
    """Windows of real text whose padding is `PAD`."""
    return TextWindows(windows_NT.where(windows_NT != PAD, IGNORED), documents_N, frozenset({SOT, EOT, PAD}))


BATCHES = [batch_of([11, 10, 7, 11]), batch_of([4, 11, 11], seed=1)]
