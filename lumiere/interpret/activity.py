"""What a model's parts do on a text: how much each writes, and which neurons are ever active.

Shapes: B batch, T position, E embedding_size, L layer, H head, V d_value, F d_ff.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lumiere.components.hooks import run_with_cache
from lumiere.components.short_repr import ShortRepr
from lumiere.data.batches import Batch
from lumiere.data.tokenizer import PAD
from lumiere.models.transformer import Transformer

LEAVES = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "mlp.hook_post", "hook_mlp_out")


@dataclass(frozen=True)
class Activity(ShortRepr):
    """Means over all tokens, padding left out.

    Attributes:
        num_windows: windows that were looked at.
        num_tokens: tokens in them.
        writes: (L, 2) the norm of what attention and feed-forward part write, over that of the stream before it.
        head_writes: (L, H) the same of each head.
        largest_activations: (L, F) the largest absolute activation of each neuron.
        tied_error: how far the logits are from the products with the token embedding, relative to the largest.
    """

    num_windows: int
    num_tokens: int
    writes: np.ndarray
    head_writes: np.ndarray
    largest_activations: np.ndarray
    tied_error: float


def measure_activity(model: Transformer, batches: Iterable[Batch]) -> Activity:
    """One forward pass a batch, in which only a layer's few numbers are kept.

    Args:
        model: in evaluation mode.
        batches: at least one.
    """
    num_windows, num_tokens, tied_error = 0, 0, 0.0
    writes_L2 = np.zeros((model.num_layers, 2))
    heads_LH = np.zeros((model.num_layers, model.num_heads))
    largest_LF = np.zeros((model.num_layers, model.d_ff))
    names = [f"blocks.{layer}.{leaf}" for layer in range(model.num_layers) for leaf in LEAVES]
    for batch in batches:
        tokens_BT = batch.tokens.to(model.token_embedding.weight.device)
        real_BT = tokens_BT != PAD
        with torch.inference_mode():
            output, cache = run_with_cache(model, tokens_BT, names)
            tied_error = float(np.maximum(tied_error, head_error(model, output.hidden_states[:, -1], output.logits)))
            for layer in range(model.num_layers):
                # Only real tokens: N of them in place of B and T.
                pre_NE, z_NHV, attention_NE, mid_NE, post_NF, feedforward_NE = (
                    cache[f"blocks.{layer}.{leaf}"][real_BT] for leaf in LEAVES
                )
                scale_N = lengths(pre_NE)
                writes_L2[layer, 0] += total(lengths(attention_NE) / scale_N)
                writes_L2[layer, 1] += total(lengths(feedforward_NE) / lengths(mid_NE))
                heads_LH[layer] += (head_lengths(model, layer, z_NHV) / scale_N[:, None]).cpu().double().sum(0).numpy()
                largest_LF[layer] = np.maximum(largest_LF[layer], post_NF.abs().amax(0).cpu().double().numpy())
        num_windows += len(tokens_BT)
        num_tokens += int(real_BT.sum())
    return Activity(num_windows, num_tokens, writes_L2 / num_tokens, heads_LH / num_tokens, largest_LF, tied_error)


def head_error(model: Transformer, resid_BTE: Tensor, logits_BTV: Tensor) -> float:
    """How far the logits are from the normalised stream times the token embedding, relative to the largest."""
    expected_BTV = model.final_norm(resid_BTE) @ model.token_embedding.weight.T
    return float((logits_BTV - expected_BTV).abs().max() / expected_BTV.abs().max().clamp(min=1))


def head_lengths(model: Transformer, layer: int, z_NHV: Tensor) -> Tensor:
    """(N, H) the norm of what each head writes, `|z W|`, by the Gram matrix of its rows W of the output matrix."""
    weight_EHV = model.blocks[layer].attention.output.weight.unflatten(1, (model.num_heads, model.d_value))
    gram_HVV = torch.einsum("ehv,ehw->hvw", weight_EHV, weight_EHV)
    return torch.einsum("nhv,hvw,nhw->nh", z_NHV, gram_HVV, z_NHV).clamp(min=0).sqrt()


def lengths(vectors_NE: Tensor) -> Tensor:
    """(N,) norms, none of them 0, so that they can be divided by."""
    return torch.linalg.vector_norm(vectors_NE, dim=-1).clamp(min=torch.finfo(vectors_NE.dtype).tiny)


def total(values_N: Tensor) -> float:
    return float(values_N.cpu().double().sum())
