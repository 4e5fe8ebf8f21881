"""Which part of the model writes a logit: direct logit attribution.

Shapes: T position, S source position, P chosen position, E embedding_size, L layer, H head, V d_value, F d_ff.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumiere.components.hooks import run_with_cache
from lumiere.interpret.result import Receipt, Result, one_sequence, rounding
from lumiere.models.transformer import Transformer

LEVELS = ("layer", "head", "neuron", "source")
BIASES = ("attention_bias", "feedforward_bias", "final_bias")


@dataclass(frozen=True, kw_only=True)
class LogitAttribution(Result):
    """What each part adds to a logit, or to a difference of logits, at each chosen position.

    Attributes:
        tokens: (T,) the ids that the model was given.
        positions: (P,) the positions whose logits are explained.
        by: the level of detail of `rows`.
        targets: (P,) the tokens whose logits are explained.
        reference: what is subtracted from each logit: the logit of the `token` `versus`, the `mean` of many, the mean
            under the model's own `prediction`, or `none`.
        versus: that token, or None.
        num_averaged: the number of tokens in that mean; 0 where the reference is `token` or `none`.
        probabilities: (P,) of the targets.
        entropies: (P,) of the model's predictions, in nats.
        logits: (P,) what is explained, from the model's own logits. With the reference `prediction` it is
            ln p(target) plus the entropy.
        scales: (P,) of the final norm, at which it is frozen.
        embed: (P,) the position's own token embedding.
        pos_embed: (P,) its position embedding; None without one, as with rotary positions.
        attention: (P, L) the attention of each layer.
        heads: (P, L, H) each head of it.
        sources: (P, L, H, S) what each head takes from each source position.
        feedforward: (P, L) the feed-forward part of each layer.
        neurons: (P, L, F) each neuron of it; no neurons in a model without feed-forward parts.
        attention_bias: (P, L) the bias of the attention's output, which no head writes; None without one.
        feedforward_bias: (P, L) the bias that no neuron writes; None without one.
        final_bias: (P,) the bias of the final norm; None without one.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    by: str
    targets: tuple[int, ...]
    reference: str
    versus: int | None
    num_averaged: int
    probabilities: np.ndarray
    entropies: np.ndarray
    logits: np.ndarray
    scales: np.ndarray
    embed: np.ndarray
    pos_embed: np.ndarray | None
    attention: np.ndarray
    heads: np.ndarray
    sources: np.ndarray
    feedforward: np.ndarray
    neurons: np.ndarray
    attention_bias: np.ndarray | None = None
    feedforward_bias: np.ndarray | None = None
    final_bias: np.ndarray | None = None

    def as_dict(self) -> dict[str, Any]:
        absent = {name for name in BIASES if getattr(self, name) is None}
        return {name: value for name, value in super().as_dict().items() if name not in absent}

    def parts(self, level: str) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Yield each part of a level, in the order of the computation, and its contributions, (P,)."""
        yield {"part": "embed"}, self.embed
        if self.pos_embed is not None:
            yield {"part": "pos_embed"}, self.pos_embed
        attention = {"head": ("head", self.heads), "source": ("head", self.sources)}.get(
            level, ("attention", self.attention)
        )
        feedforward = ("neuron", self.neurons) if level == "neuron" else ("feedforward", self.feedforward)
        parts: list[tuple[str, np.ndarray | None]] = [attention, feedforward]
        if level in ("head", "source"):
            parts.insert(1, ("attention_bias", self.attention_bias))
        if level == "neuron":
            parts.append(("feedforward_bias", self.feedforward_bias))
        for layer in range(self.attention.shape[1]):
            for part, values in parts:
                if values is None or not values.size:
                    continue
                for place in np.ndindex(*values.shape[2:]):
                    names = dict(zip((part, "source"), place, strict=False))
                    yield {"part": part, "layer": layer, **names}, values[:, layer, *place]
        if self.final_bias is not None:
            yield {"part": "final_bias"}, self.final_bias

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for part, added_P in self.parts(self.by):
            for column, position in enumerate(self.positions):
                # A head takes nothing from later positions.
                if part.get("source", 0) <= position:
                    nowhere = dict.fromkeys(("layer", "head", "source", "neuron"))
                    about = {"position": position, "target": self.targets[column], "part": part["part"]}
                    yield {**about, **nowhere, **part, "contribution": float(added_P[column])}


def logit_attribution(
    model: Transformer,
    tokens: Sequence[int],
    positions: Sequence[int] | None = None,
    target: int | Sequence[int] | None = None,
    versus: int | None = None,
    centered: bool = True,
    by: str = "layer",
    averaged: Sequence[int] | None = None,
    log_probability: bool = False,
) -> LogitAttribution:
    """Compute `(c / s * gain) . d` for each part c of the final residual stream; the sum is the logit along d.

    Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; logit differences: Wang et al. 2022,
    "Interpretability in the Wild". The stream is the sum of all that was written to it, and the final norm is linear
    once its scale s is frozen at its value, so that the sum is exact. It is the direct effect only: what a part does
    through later parts is counted as theirs, and so is its effect on the scale.

    The direction d is `W_U[target] - W_U[versus]`, or without `versus` the centered `W_U[target] - mean(W_U)`. A plain
    logit can be moved by any vector added to all of W_U, which changes no probability, and so its parts say little.
    With `log_probability` it is `W_U[target] - sum_v p_v W_U[v]`, with the model's own prediction p held fixed: the
    gradient of ln p(target). Since ln sum exp(logits) is `sum_v p_v logits_v` plus the entropy of p, the parts sum to
    ln p(target) plus that entropy.

    Args:
        tokens: (T,) ids, at most `context_size` of them.
        positions: whose logits to explain (None: the last).
        target: the token, or one for each position (None: at each position the model's most probable one).
        versus: the token whose logit is taken from it.
        centered: without `versus`, subtract the mean of the logits of `averaged`.
        by: the level of detail of the table; all levels are computed.
        averaged: the tokens whose logits are averaged, such as those that occur in training (None: all).
        log_probability: without `versus`, explain ln p(target) instead of the centered logit.
    """
    positions = [len(tokens) - 1] if positions is None else list(positions)
    with torch.inference_mode():
        output, cache = run_with_cache(model, one_sequence(model, tokens), hook_names(model))
        # In float64, and so on the CPU, since not every device has it; without the batch axis.
        activations = {name: values[0].cpu().double() for name, values in cache.items()}
        logits_PV = output.logits[0, positions].cpu().double()
        if target is None:
            targets_P = logits_PV.argmax(-1)
        else:
            targets_P = torch.tensor([target] * len(positions) if isinstance(target, int) else list(target))
        scales_P = activations["ln_final.hook_scale"][positions, 0]
        log_probabilities_PV = logits_PV.log_softmax(-1)
        probabilities_PV = log_probabilities_PV.exp()
        entropies_P = torch.special.entr(probabilities_PV).sum(-1)
        rows = torch.arange(len(positions))
        explained_P = own_P = logits_PV[rows, targets_P]
        reference, num_averaged, weights_PV = "none", 0, torch.zeros_like(logits_PV[:1])
        if versus is not None:
            reference, weights_PV[:, versus] = "token", 1.0
            explained_P = own_P - logits_PV[:, versus]
        elif log_probability:
            reference, num_averaged, weights_PV = "prediction", model.vocab_size, probabilities_PV
            explained_P = log_probabilities_PV[rows, targets_P] + entropies_P
        elif centered:
            ids = torch.arange(model.vocab_size) if averaged is None else torch.tensor(list(averaged))
            reference, num_averaged, weights_PV[:, ids] = "mean", len(ids), 1 / len(ids)
            explained_P = own_P - logits_PV[:, ids].mean(-1)
        direction_PE, final_bias_P = frozen_directions(model, targets_P, weights_PV)
        added = attribute(model, activations, positions, direction_PE / scales_P.unsqueeze(1))
    result = LogitAttribution(
        tokens=tuple(tokens),
        positions=tuple(positions),
        by=by,
        targets=tuple(targets_P.tolist()),
        reference=reference,
        versus=versus,
        num_averaged=num_averaged,
        probabilities=probabilities_PV[rows, targets_P].numpy(),
        entropies=entropies_P.numpy(),
        logits=explained_P.numpy(),
        scales=scales_P.numpy(),
        pos_embed=added.pop("pos_embed", None),
        **added,
        final_bias=None if final_bias_P is None else final_bias_P.numpy(),
        receipts=(),
    )
    return replace(result, receipts=tuple(sum_receipt(result, level, rounding(model)) for level in LEVELS))


def hook_names(model: Transformer) -> list[str]:
    """Return the activations that the attribution reads."""
    leaves = ["attn.hook_v", "attn.hook_pattern", "attn.hook_z", "hook_attn_out"]
    leaves += [] if model.settings.feedforward == "none" else ["mlp.hook_post", "hook_mlp_out"]
    names = ["hook_embed", *([] if model.hook_pos_embed is None else ["hook_pos_embed"])]
    names += [f"blocks.{layer}.{leaf}" for layer in range(model.num_layers) for leaf in leaves]
    return [*names, "ln_final.hook_scale"]


def frozen_directions(model: Transformer, targets_P: Tensor, weights_PV: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the direction, (P, E), whose product with a part of the stream, over the scale, is its contribution.

    Args:
        weights_PV: of the logits that are subtracted, (P, Vocab), or (1, Vocab) where they are the same everywhere.

    Returns:
        The direction, and what the bias of the final norm adds, (P,); None without a bias.
    """
    unembed_VE = model.unembedding.cpu().double()
    return model.final_norm.folded(unembed_VE[targets_P] - weights_PV @ unembed_VE)


def attribute(
    model: Transformer, activations: Mapping[str, Tensor], positions: Sequence[int], direction_PE: Tensor
) -> dict[str, np.ndarray]:
    """Project every part on a direction at each position, by mapping the direction back through each output matrix."""

    def along(name: str) -> Tensor:
        return (activations[name][positions] * direction_PE).sum(-1)

    added: dict[str, list[Tensor]] = {"attention": [], "heads": [], "sources": [], "feedforward": [], "neurons": []}
    for layer, block in enumerate(model.blocks):
        name, output = f"blocks.{layer}.", block.attention.output
        output_EHV = output.weight.cpu().double().unflatten(1, (model.num_heads, model.d_value))
        direction_PHV = torch.einsum("pe,ehv->phv", direction_PE, output_EHV)
        v_SHV = block.attention.per_head(activations[f"{name}attn.hook_v"], dim=1)
        values_PHS = torch.einsum("phv,shv->phs", direction_PHV, v_SHV)
        pattern_PHS = activations[f"{name}attn.hook_pattern"][:, positions].transpose(0, 1)
        added["attention"].append(along(f"{name}hook_attn_out"))
        added["heads"].append((activations[f"{name}attn.hook_z"][positions] * direction_PHV).sum(-1))
        added["sources"].append(pattern_PHS * values_PHS)
        if output.bias is not None:
            added.setdefault("attention_bias", []).append(direction_PE @ output.bias.cpu().double())
        if block.feedforward is None:
            added["feedforward"].append(direction_PE.new_zeros(len(positions)))
            added["neurons"].append(direction_PE.new_zeros(len(positions), 0))
            continue
        down = block.feedforward.down
        direction_PF = direction_PE @ down.weight.cpu().double()
        added["feedforward"].append(along(f"{name}hook_mlp_out"))
        added["neurons"].append(activations[f"{name}mlp.hook_post"][positions] * direction_PF)
        if down.bias is not None:
            added.setdefault("feedforward_bias", []).append(direction_PE @ down.bias.cpu().double())
    arrays = {name: torch.stack(values, dim=1).numpy() for name, values in added.items()}
    arrays["embed"] = along("hook_embed").numpy()
    if model.hook_pos_embed is not None:
        arrays["pos_embed"] = along("hook_pos_embed").numpy()
    return arrays


def sum_receipt(result: LogitAttribution, level: str, tolerance: float) -> Receipt:
    """Check that the parts of a level sum to the logit, relative to the larger of 1 and the largest part."""
    parts = np.stack([added_P for _, added_P in result.parts(level)])
    scale = np.maximum(1.0, np.abs(parts).max(axis=0))
    error = float((np.abs(parts.sum(axis=0) - result.logits) / scale).max())
    total = "ln p + entropy" if result.reference == "prediction" else "the model's logit"
    return Receipt(f"by {level}, the parts sum to {total}", error, tolerance)
