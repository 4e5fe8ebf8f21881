"""Describe what makes neurons fire, and where the token embeddings lie.

Shapes: L layer, N chosen neuron of a layer (or chosen token), K example (or neighbor), W window of the batches, T
position, E embedding_size, P promoted token, F d_ff, Vocab vocab_size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lumiere.components.hooks import run_with_cache
from lumiere.components.layers import feedforward_of
from lumiere.data.batches import Batch
from lumiere.interpret.result import FLOAT64_TOLERANCE, Receipt, Result, float64, rounding, table
from lumiere.models.transformer import Transformer

NO_EXAMPLE = -1


@dataclass(frozen=True, kw_only=True)
class NeuronExamples(Result):
    """The strongest activations of neurons, at most one in a window, so that a repetitive text does not fill the list.

    Attributes:
        tokens: (W, T) the ids of the windows, `<|pad|>` after the end of one.
        neurons: (L, N) which neurons of each layer, those that write most first.
        activations: (L, N, K) signed, the largest absolute value first; NaN where no window is left.
        windows: (L, N, K) the window of each; -1 without one.
        positions: (L, N, K) the place in it.
        around: (L, N, K, A) the activations at the positions from `before` tokens before to `after` tokens after, NaN
            beyond the window.
        before, after: tokens of context.
        promoted: (L, N, P) the tokens whose logits rise most where the neuron is as in its first example.
        num_tokens: tokens that were read.
    """

    tokens: np.ndarray
    neurons: np.ndarray
    activations: np.ndarray
    windows: np.ndarray
    positions: np.ndarray
    around: np.ndarray
    before: int
    after: int
    promoted: np.ndarray
    num_tokens: int

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for layer, row, rank in np.argwhere(self.windows != NO_EXAMPLE).tolist():
            window, position = int(self.windows[layer, row, rank]), int(self.positions[layer, row, rank])
            yield {
                "layer": layer,
                "neuron": int(self.neurons[layer, row]),
                "rank": rank,
                "activation": float(self.activations[layer, row, rank]),
                "window": window,
                "position": position,
                "token": int(self.tokens[window, position]),
            }


def neuron_examples(
    model: Transformer,
    batches: Sequence[Batch],
    num_neurons: int,
    num_examples: int = 5,
    num_promoted: int = 5,
    before: int = 8,
    after: int = 3,
) -> NeuronExamples:
    """Find the tokens at which each neuron's activation (`hook_post`) is largest in absolute value, one in a window.

    The first token of a window never counts: it has no context, and many neurons respond to that.

    A neuron responds to patterns in its input (Geva et al. 2021, "Transformer Feed-Forward Layers Are Key-Value
    Memories", section 3). It writes its activation times its row of the second matrix, which promotes tokens (Geva et
    al. 2022, "Transformer Feed-Forward Layers Build Predictions by Promoting Concepts in the Vocabulary Space", section
    3). With SwiGLU a negative activation promotes the opposite tokens, so the largest absolute value counts. The
    `num_neurons` of each layer that write the largest vectors are kept.

    Args:
        batches: at least one; all of one width T.
        num_neurons: how many of each layer (at most d_ff).
        num_examples, num_promoted: windows and tokens of each.
        before, after: context of an example, in tokens.

    Raises:
        LumiereError: the model has no feed-forward parts.
    """
    device = model.token_embedding.weight.device
    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(model.num_layers)]
    downs = [feedforward_of(block).down.weight.detach() for block in model.blocks]
    norms_LF = torch.stack([torch.linalg.vector_norm(down, dim=0).cpu() for down in downs])  # Tensor.norm warns on mps
    tokens_WT = torch.cat([batch.tokens for batch in batches]).cpu()
    is_real_WT = torch.cat([batch.is_real for batch in batches]).cpu()
    peaks, places = [], []
    with torch.inference_mode():
        for batch in batches:
            posts_LWTF = neuron_activations(model, batch.tokens.to(device), names)
            masked = posts_LWTF.abs().masked_fill(~batch.is_real.cpu()[None, :, :, None], -1)
            masked[:, :, 0] = -1
            peak_LWF, place_LWF = masked.max(dim=2)
            peaks.append(peak_LWF)
            places.append(place_LWF)
        peak_LWF, place_LWF = torch.cat(peaks, dim=1), torch.cat(places, dim=1)
        chosen_LN = (peak_LWF.amax(dim=1) * norms_LF).topk(num_neurons, dim=-1).indices
        index_LWN = chosen_LN[:, None, :].expand(-1, len(tokens_WT), -1)
        peak_LWN, place_LWN = peak_LWF.gather(-1, index_LWN), place_LWF.gather(-1, index_LWN)
        kept = min(num_examples, len(tokens_WT))
        top_LKN = peak_LWN.topk(kept, dim=1)
        # A window of one token has no example; it is last, and only among the top where there are too few windows.
        is_there_LNK = (top_LKN.values >= 0).transpose(1, 2)
        windows_LNK = top_LKN.indices.transpose(1, 2).where(is_there_LNK, NO_EXAMPLE)
        positions_LNK = place_LWN.gather(1, top_LKN.indices).transpose(1, 2)
        around_LNKA = torch.full((*windows_LNK.shape, before + 1 + after), torch.nan, dtype=peak_LWF.dtype)
        places_LNKA = positions_LNK.unsqueeze(-1) + torch.arange(-before, after + 1)
        is_inside = (places_LNKA >= 0) & (places_LNKA < tokens_WT.shape[1]) & (windows_LNK != NO_EXAMPLE).unsqueeze(-1)
        is_inside &= is_real_WT[windows_LNK.unsqueeze(-1), places_LNKA.clamp(0, tokens_WT.shape[1] - 1)]
        first = 0
        for batch in batches:  # again, rather than hold all activations of all windows
            posts_LWTF = neuron_activations(model, batch.tokens.to(device), names)
            is_here = (windows_LNK >= first) & (windows_LNK < first + len(batch.tokens))
            place = layer, row, rank, _ = (is_inside & is_here.unsqueeze(-1)).nonzero(as_tuple=True)
            windows = windows_LNK[layer, row, rank] - first
            around_LNKA[place] = posts_LWTF[layer, windows, places_LNKA[place], chosen_LN[layer, row]]
            first += len(batch.tokens)
        activations_LNK = around_LNKA[..., before].clone()
        promoted_LNP = torch.stack(
            [
                promoted(model, layer, chosen_LN[layer], activations_LNK[layer, :, 0], num_promoted)
                for layer in range(model.num_layers)
            ]
        )
    differences_LNK = activations_LNK.abs() - top_LKN.values.transpose(1, 2)
    missed = differences_LNK[is_there_LNK].abs().max() / peak_LWF.max().clamp(min=1)
    return NeuronExamples(
        tokens=tokens_WT.numpy(),
        neurons=chosen_LN.numpy(),
        activations=activations_LNK.numpy(),
        windows=windows_LNK.numpy(),
        positions=positions_LNK.numpy(),
        around=around_LNKA.numpy(),
        before=before,
        after=after,
        promoted=promoted_LNP.numpy(),
        num_tokens=int(is_real_WT.sum()),
        receipts=(Receipt("a second pass finds the same activations", float(missed), rounding(model)),),
    )


def neuron_activations(model: Transformer, tokens_BT: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Return the neurons' activations, (L, B, T, F), on the CPU."""
    _, cache = run_with_cache(model, tokens_BT, names)
    return torch.stack([cache[name].cpu() for name in names])


def promoted(
    model: Transformer, layer: int, neurons_N: torch.Tensor, activations_N: torch.Tensor, count: int
) -> torch.Tensor:
    """Return the tokens whose logits rise most by what each neuron writes, (N, count), up to the final norm's scale."""
    down, device = feedforward_of(model.blocks[layer]).down.weight.detach(), model.unembedding.device
    written_NE = down.T[neurons_N.to(device)] * activations_N.sign()[:, None].to(device)
    return (model.final_norm.linear(written_NE) @ model.unembedding.T).topk(count, dim=-1).indices.cpu()


@dataclass(frozen=True, kw_only=True)
class TokenMap(Result):
    """A map of tokens in two dimensions.

    Attributes:
        tokens: (N,) the ids on the map.
        points: (N, 2) their places: scores on the first two principal components.
        variances: (2,) the share of the variance that each direction explains.
        neighbours: (N, K) the tokens on the map with the largest cosine, the nearest first.
        cosines: (N, K), of the embeddings less the mean embedding.
    """

    tokens: tuple[int, ...]
    points: np.ndarray
    variances: np.ndarray
    neighbours: np.ndarray
    cosines: np.ndarray

    def rows(self) -> Iterator[Mapping[str, Any]]:
        nearest = {"neighbour": self.neighbours[:, 0], "cosine": self.cosines[:, 0]} if self.cosines.size else {}
        return table({"token": self.tokens}, x=self.points[:, 0], y=self.points[:, 1], **nearest)


def token_map(model: Transformer, tokens: Sequence[int], num_neighbours: int = 5) -> TokenMap:
    """Compute principal components of the embeddings of `tokens` (Pearson 1901; Hotelling 1933), and nearest neighbors.

    A flat map hides most of the E dimensions: points that are near on it may be far apart. The neighbors are computed
    in all dimensions, by the cosine of embeddings less their mean, since one shared direction makes all cosines large
    (Mu and Viswanath 2018, "All-but-the-Top"). The sign of a component is arbitrary; here the largest absolute
    coordinate is positive.

    Args:
        tokens: at least one id, each once. The coordinates along missing components are 0.
        num_neighbours: neighbors of each token; fewer if there are fewer tokens.
    """
    table_NE = float64(model.token_embedding.weight)[list(tokens)]
    centered_NE = table_NE - table_NE.mean(0)
    left, sizes, directions = np.linalg.svd(centered_NE, full_matrices=False)
    # One token, or a width of one, has a single component.
    lacking = max(0, 2 - len(sizes))
    left, sizes = np.pad(left, ((0, 0), (0, lacking))), np.pad(sizes, (0, lacking))
    directions = np.pad(directions, ((0, lacking), (0, 0)))
    points_N2 = left[:, :2] * sizes[:2]
    points_N2 *= np.sign(points_N2[np.abs(points_N2).argmax(0), [0, 1]])
    total = max(np.square(centered_NE).sum(), np.finfo(float).tiny)
    unit_NE = centered_NE / np.maximum(np.linalg.norm(centered_NE, axis=1, keepdims=True), np.finfo(float).tiny)
    cosine_NN = unit_NE @ unit_NE.T
    np.fill_diagonal(cosine_NN, -np.inf)
    order = np.argsort(-cosine_NN, axis=1, kind="stable")[:, : min(num_neighbours, len(tokens) - 1)]
    projected_N2 = centered_NE @ directions[:2].T
    missed = np.abs(np.abs(projected_N2) - np.abs(points_N2)).max() / max(1.0, float(np.abs(points_N2).max()))
    variance_error = abs(np.square(sizes).sum() - np.square(centered_NE).sum()) / total
    return TokenMap(
        tokens=tuple(tokens),
        points=points_N2,
        variances=np.square(sizes[:2]) / total,
        neighbours=np.array(tokens)[order],
        cosines=np.take_along_axis(cosine_NN, order, axis=1),
        receipts=(
            Receipt("the map is a projection of the embeddings", float(missed), FLOAT64_TOLERANCE),
            Receipt("the directions hold all variance", float(variance_error), FLOAT64_TOLERANCE),
        ),
    )
