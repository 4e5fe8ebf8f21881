"""A two-layer induction circuit, built weight by weight on our own model: what every head does is known exactly.

The residual stream has three parts, each with one axis a value: the token here, the position, and the token before.
Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", describe the circuit: a previous-token head in
layer 0 writes the token before into the stream, and the induction head of layer 1 looks for its own token there (K
composition). All other heads only look, and write nothing; the feed-forward parts are zero.

Shapes: T position, S source position, E embedding_size, K d_key, V d_value.
"""

import math

import torch
from torch import Tensor

from lumiere.models.transformer import Transformer

PREVIOUS, FIRST, DUPLICATE, UNIFORM = (0, 0), (0, 1), (0, 2), (0, 3)
CURRENT, INDUCTION = (1, 1), (1, 2)
"""(layer, head). Heads 0 and 3 of layer 1 are uniform too."""

SCORE = 60.0
"""What a match adds to an attention score: exp(-60) is nothing beside 1, in float32 too."""
COPIED = 3.0
"""How many times as strong as the token itself the copy of the induction head is."""
LOGIT = 20.0
"""About the logit of the token that the induction head copies."""


def induction_circuit(vocab_size: int = 24, context_size: int = 33) -> Transformer:
    """The model, in evaluation mode. On `<|sot|>` and S different tokens twice, each head looks at one token alone.

    Wherever a head finds nothing to match (the second of two copies, in the first), its row is uniform.

    Args:
        vocab_size: number of tokens.
        context_size: number of positions.
    """
    token, position, before = (
        torch.arange(vocab_size),
        vocab_size + torch.arange(context_size),
        vocab_size + context_size + torch.arange(vocab_size),
    )
    embedding_size, d_key = 2 * vocab_size + context_size, vocab_size + context_size
    model = Transformer(
        vocab_size, embedding_size, context_size, num_layers=2, num_heads=4, d_key=d_key, d_value=vocab_size, d_ff=1
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.token_embedding.weight[:, token] = torch.eye(vocab_size)
        assert model.position_embedding is not None
        model.position_embedding.weight[:, position] = torch.eye(context_size)
        # The stream has two entries of 1 before layer 0 and three before layer 1: these gains undo the norms.
        for block, ones in zip(model.blocks, (2, 3), strict=True):
            gain = math.sqrt(ones / embedding_size + model.settings.norm_epsilon)
            block.attention_norm.get_parameter("weight").fill_(gain)
        model.final_norm.get_parameter("weight").fill_(LOGIT / COPIED * math.sqrt((3 + COPIED**2) / embedding_size))

        on_token, on_position = torch.arange(vocab_size), vocab_size + torch.arange(context_size)
        match(model, PREVIOUS, position[1:], position[:-1], on_position[:-1])
        match(model, FIRST, position, position[:1].expand(context_size), on_position[:1].expand(context_size))
        match(model, DUPLICATE, token, token, on_token)
        match(model, DUPLICATE, position, position, on_position, -SCORE)  # no token is the duplicate of itself
        match(model, CURRENT, position, position, on_position)
        match(model, INDUCTION, token, before, on_token)
        copy(model, PREVIOUS, token, before, 1.0)
        copy(model, INDUCTION, token, token, COPIED)
    return model.eval()


def of_head(weight: Tensor, head: int) -> Tensor:
    """A head's rows of a projection, (K or V, E)."""
    return weight.view(4, -1, weight.shape[1])[head]


def match(
    model: Transformer,
    place: tuple[int, int],
    query_axes: Tensor,
    key_axes: Tensor,
    channels: Tensor,
    score: float = SCORE,
) -> None:
    """A query with `query_axes[i]` set gives `score` to keys with `key_axes[i]` set, by way of `channels[i]`."""
    layer, head = place
    attention = model.blocks[layer].attention
    of_head(attention.query.weight, head)[channels, query_axes] = score * math.sqrt(attention.d_key)
    of_head(attention.key.weight, head)[channels, key_axes] = 1.0


def copy(model: Transformer, place: tuple[int, int], from_axes: Tensor, to_axes: Tensor, strength: float) -> None:
    """What a head reads on `from_axes[i]` it writes to `to_axes[i]`."""
    layer, head = place
    attention = model.blocks[layer].attention
    channels = torch.arange(len(from_axes))
    of_head(attention.value.weight, head)[channels, from_axes] = 1.0
    attention.output.weight[to_axes, head * attention.d_value + channels] = strength


def repeated_tokens(length: int, vocab_size: int = 24, seed: int = 0) -> list[int]:
    """`<|sot|>` (0) and `length` different tokens, twice; ids 1 and 2 are left out."""
    generator = torch.Generator().manual_seed(seed)
    once = (3 + torch.randperm(vocab_size - 3, generator=generator)[:length]).tolist()
    return [0, *once, *once]
