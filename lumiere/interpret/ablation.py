"""Measure the loss without a part of the model: each head, feed-forward part, layer, neuron or position in turn.

Shapes: B batch, T position, E embedding_size, H head, V d_value, F d_ff; S sequences, M batches; U ablations (or
units of a layer), N ablations of one forward pass, R = N * B rows, D units of a layer, W width of a unit's activation,
P predictions of R rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere.components.hooks import hooked, run_with_cache
from lumiere.components.kernels import IGNORED, linear_cross_entropy_losses
from lumiere.data.batches import Batch, documents_of
from lumiere.data.tokenizer import PAD
from lumiere.errors import LumiereError, check_choice
from lumiere.evaluation.scoring import clustered_means
from lumiere.interpret.result import Receipt, Result, rounding
from lumiere.models.transformer import Transformer

Stage = Literal["pre", "mid", "post"]
"""Where in a block a change of the residual stream enters it: `hook_resid_pre`, `_mid` or `_post`."""

Cache = Mapping[str, Tensor]


Write = Callable[[Transformer, int, Tensor, Sequence[int]], Tensor]
"""(model, layer, new activations less old ones (B, T, U, W), chosen units) -> (N, B, T, E): what a change of each of
these units, and of no other, adds to the stream."""


@dataclass(frozen=True)
class Unit:
    """A kind of part that can be ablated.

    Attributes:
        label: how unit `index` of a layer is called.
        count: (model, T) -> U.
        hooks: the activations that `read` needs, without `blocks.<layer>.`, the one that is replaced first.
        read: (activations by such a name) -> (B, T, U, W), which of it is replaced.
        place: where unit `index` is in the first of `hooks`.
        write: what follows from a replacement.
        stage: where in the block that enters the stream.
    """

    label: str
    count: Callable[[Transformer, int], int]
    hooks: tuple[str, ...]
    read: Callable[[Cache], Tensor]
    place: Callable[[int], tuple[Any, ...]]
    write: Write
    stage: Stage


def write_head(model: Transformer, layer: int, difference_BTHV: Tensor, heads: Sequence[int]) -> Tensor:
    """Multiply by the head's own rows of the output projection."""
    weight_HVE = model.blocks[layer].attention.output.weight.T.unflatten(0, (model.num_heads, model.d_value))
    return torch.einsum("btnv,nve->nbte", difference_BTHV[:, :, list(heads)], weight_HVE[list(heads)])


def write_neuron(model: Transformer, layer: int, difference_BTF1: Tensor, neurons: Sequence[int]) -> Tensor:
    """Multiply by the neuron's own row of the second feed-forward matrix."""
    weight_NE = model.blocks[layer].feedforward.down.weight.T[list(neurons)]
    return torch.einsum("btn,ne->nbte", difference_BTF1[:, :, list(neurons), 0], weight_NE)


def write_stream(model: Transformer, layer: int, difference_BT1E: Tensor, indices: Sequence[int]) -> Tensor:
    """Return the change itself: it is read where it enters the stream."""
    return difference_BT1E.permute(2, 0, 1, 3)[list(indices)]


def write_position(model: Transformer, layer: int, difference_BT1E: Tensor, positions: Sequence[int]) -> Tensor:
    """Return the change at one position, and zero at the others."""
    written_NBTE = difference_BT1E.new_zeros(len(positions), *difference_BT1E[:, :, 0].shape)
    for row, position in enumerate(positions):
        written_NBTE[row, :, position] = difference_BT1E[:, position, 0]
    return written_NBTE


UNITS: Mapping[str, Unit] = {
    "head": Unit(
        label="L{layer}H{index}",
        count=lambda model, num_positions: model.num_heads,
        hooks=("attn.hook_z",),
        read=lambda cache: cache["attn.hook_z"],
        place=lambda index: (..., index, slice(None)),
        write=write_head,
        stage="mid",
    ),
    "feedforward": Unit(
        label="L{layer} feed-forward",
        count=lambda model, num_positions: 1,
        hooks=("hook_mlp_out",),
        read=lambda cache: cache["hook_mlp_out"].unsqueeze(2),
        place=lambda index: (...,),
        write=write_stream,
        stage="post",
    ),
    "layer": Unit(
        label="L{layer}",
        count=lambda model, num_positions: 1,
        hooks=("hook_resid_post", "hook_resid_pre"),
        read=lambda cache: (cache["hook_resid_post"] - cache["hook_resid_pre"]).unsqueeze(2),
        place=lambda index: (...,),
        write=write_stream,
        stage="post",
    ),
    "neuron": Unit(
        label="L{layer}N{index}",
        count=lambda model, num_positions: model.d_ff,
        hooks=("mlp.hook_post",),
        read=lambda cache: cache["mlp.hook_post"].unsqueeze(-1),
        place=lambda index: (..., index),
        write=write_neuron,
        stage="post",
    ),
    "position": Unit(
        label="L{layer}P{index}",
        count=lambda model, num_positions: num_positions,
        hooks=("hook_resid_pre",),
        read=lambda cache: cache["hook_resid_pre"].unsqueeze(2),
        place=lambda index: (slice(None), index),
        write=write_position,
        stage="pre",
    ),
}


def find_unit(name: str) -> Unit:
    """Return the unit of that name.

    Raises:
        LumiereError: there is no such unit.
    """
    check_choice("unit", name, UNITS)
    return UNITS[name]


def stream_after(model: Transformer, layer: int, stage: Stage, resid_BTE: Tensor) -> Tensor:
    """Return the normalized final residual stream, given the stream at a stage of a block.

    Args:
        model: in evaluation mode.
        resid_BTE: (B, T, E).
    """
    if stage == "pre":
        return model.continue_from(resid_BTE, layer)
    if stage == "mid":
        block = model.blocks[layer]
        resid_BTE = resid_BTE + block.feedforward(block.feedforward_norm(resid_BTE))
    return model.continue_from(resid_BTE, layer + 1)


TOKENS_AT_ONCE = 2048
"""Of one forward pass: fewer make the products slow, more leave the cache."""


class Trial:
    """One batch: the model's activations, their replacements, and the losses with and without each unit.

    Args:
        means: by layer, from `mean_activations`; of mode `mean`.
        generator: of mode `resample`; each trial takes from it what it needs once, whatever is ablated.
    """

    def __init__(
        self,
        model: Transformer,
        batch: Batch,
        kind: Unit,
        layers: Sequence[int],
        mode: str,
        means: Mapping[int, Tensor],
        generator: torch.Generator,
    ) -> None:
        self.model, self.batch, self.kind = model, batch, kind
        self.losses_B = self._losses(model.final_residual(batch.tokens))[0]
        self.activations = caches(model, batch, kind, layers)
        donors_BT = draw_donors(batch.tokens.cpu() != PAD, generator) if mode == "resample" else None
        self.differences: dict[int, Tensor] = {}
        for layer in layers:
            old_BTDW = kind.read(self.activations[layer])
            if donors_BT is not None:
                positions_T = torch.arange(old_BTDW.shape[1], device=old_BTDW.device)
                new_BTDW = old_BTDW[donors_BT.to(old_BTDW.device), positions_T]
            else:
                new_BTDW = means.get(layer, 0.0)
            self.differences[layer] = new_BTDW - old_BTDW

    def _losses(self, residual_RTE: Tensor) -> Tensor:
        """Sum the losses of each sequence, (N, B), for each copy of the batch along R, in float64 on the CPU."""
        targets_BT = self.batch.targets
        num_copies = len(residual_RTE) // len(targets_BT)
        is_real_RT = (targets_BT != IGNORED).repeat(num_copies, 1)
        targets_P = targets_BT.repeat(num_copies, 1)[is_real_RT]
        # What is not to be predicted, such as a first copy, needs no logits, which are most of the work.
        losses_P = linear_cross_entropy_losses(residual_RTE[is_real_RT], self.model.token_embedding.weight, targets_P)
        sums_R = torch.zeros(len(is_real_RT), dtype=torch.float64)
        sums_R.index_add_(0, is_real_RT.nonzero()[:, 0].cpu(), losses_P.cpu().double())
        return sums_R.view(num_copies, -1)

    def _loss(self, losses_B: Tensor) -> Tensor:
        """Return the mean over the tokens."""
        return losses_B.sum(-1) / self.batch.num_targets

    def ablated(self, layer: int, indices: Sequence[int]) -> Tensor:
        """Sum each sequence's losses without each unit of a layer, one at a time, (N, B)."""
        stream_BTE = self.activations[layer][f"hook_resid_{self.kind.stage}"]
        at_once = max(1, TOKENS_AT_ONCE // self.batch.tokens.numel())
        losses = []
        for first in range(0, len(indices), at_once):
            chosen = indices[first : first + at_once]
            written_NBTE = self.kind.write(self.model, layer, self.differences[layer], chosen)
            copies_RTE = (stream_BTE + written_NBTE).flatten(0, 1)
            losses.append(self._losses(stream_after(self.model, layer, self.kind.stage, copies_RTE)))
        return torch.cat(losses)

    def alone(self, layer: int, index: int) -> Tensor:
        """Return the loss without one unit, by a hook in a whole forward pass."""
        name, place = f"blocks.{layer}.{self.kind.hooks[0]}", self.kind.place(index)

        def replace(activation: Tensor) -> Tensor:
            changed = activation.clone()
            changed[place] += self.differences[layer].reshape(activation.shape)[place]
            return changed

        with hooked(self.model, {name: replace}):
            logits = self.model(self.batch.tokens).logits
        losses = F.cross_entropy(
            logits.flatten(0, 1).cpu().double(),
            self.batch.targets.flatten().cpu(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        return losses / self.batch.num_targets

    def receipts(self, indices: Sequence[int], ablated_UB: Tensor) -> tuple[Receipt, ...]:
        """Check that nothing but the ablation changes the loss, and recompute the strongest ablation by a hook."""
        clean, ablated_U = self._loss(self.losses_B), self._loss(ablated_UB)
        layers, stage = list(self.activations), self.kind.stage
        unchanged = [self.activations[layer][f"hook_resid_{stage}"] for layer in layers]
        again = [
            self._loss(self._losses(stream_after(self.model, layer, stage, stream))[0])
            for layer, stream in zip(layers, unchanged, strict=True)
        ]
        strongest = int((ablated_U - clean).abs().argmax())
        row, column = divmod(strongest, len(indices))
        by_hook = self.alone(layers[row], indices[column])
        tolerance = rounding(self.model)
        return (
            Receipt(
                "the loss with nothing ablated",
                max(relative_error(loss, clean) for loss in again),
                tolerance,
            ),
            Receipt(
                "the strongest ablation, by a hook in a whole forward pass",
                relative_error(ablated_U[strongest], by_hook.cpu()),
                tolerance,
            ),
        )


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs() / expected.abs().clamp(min=1))


def caches(model: Transformer, batch: Batch, kind: Unit, layers: Sequence[int]) -> dict[int, Cache]:
    """Return for each layer the activations that the unit needs, by their names within the block."""
    leaves = (*kind.hooks, f"hook_resid_{kind.stage}")
    _, cache = run_with_cache(model, batch.tokens, {f"blocks.{layer}.{leaf}" for layer in layers for leaf in leaves})
    return {layer: {leaf: cache[f"blocks.{layer}.{leaf}"] for leaf in leaves} for layer in layers}


def mean_activations(
    model: Transformer, batches: Sequence[Batch], kind: Unit, layers: Sequence[int]
) -> dict[int, Tensor]:
    """Return for each layer the mean over all tokens but padding, (D, W), summed in float64."""
    sums: dict[int, Tensor] = {}
    for batch in batches:
        real_BT = batch.tokens != PAD
        for layer, cache in caches(model, batch, kind, layers).items():
            sums[layer] = sums.get(layer, 0.0) + kind.read(cache)[real_BT].cpu().double().sum(0)
    num_tokens = sum(int((batch.tokens != PAD).sum()) for batch in batches)
    weight = model.token_embedding.weight
    # The type first: not every device has float64.
    return {layer: (total / num_tokens).to(weight.dtype).to(weight.device) for layer, total in sums.items()}


def draw_donors(real_BT: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the sequence whose activation replaces each sequence's own, (B, T): the next one in a random circle.

    Where the next one has ended, it is the first one after it that has not; where all others have, the sequence itself.
    """
    num_sequences = len(real_BT)
    circle = torch.randperm(num_sequences, generator=generator)
    following = torch.empty_like(circle)
    following[circle] = circle.roll(-1)
    candidates = torch.arange(num_sequences)
    donors_BT = candidates.unsqueeze(1).repeat(1, real_BT.shape[1])
    is_open_BT = real_BT.clone()
    for _ in range(num_sequences - 1):
        candidates = following[candidates]
        is_taken_BT = is_open_BT & real_BT[candidates]
        donors_BT = torch.where(is_taken_BT, candidates.unsqueeze(1), donors_BT)
        is_open_BT &= ~is_taken_BT
    return donors_BT


MODES = ("mean", "zero", "resample")


@dataclass(frozen=True, kw_only=True)
class Ablations(Result):
    """The effect of each ablation on the loss, in nats per token: positive if the part was of use.

    Attributes:
        unit: what is ablated, a name of `UNITS`.
        mode: its replacement, one of `MODES`.
        labels: (U,) such as L1H3.
        layers: (U,) counted from 0.
        indices: (U,) which of the layer's units, counted from 0.
        changes: (U,) mean loss with the ablation minus the mean loss without.
        standard_errors: (U,) of `changes`, clustered by document; NaN for a single document.
        documents: (S,) which document each sequence is cut from; sequences that are texts of their own have numbers
            below 0.
        order: (U,) from the largest change to the smallest.
        loss: without any ablation.
        batch_losses: (M,) the same, of each batch.
        batch_changes: (U, M) the change within each batch.
        num_targets: (M,) predicted tokens of each batch.
        tokens: (S, T + 1) the ids, `<|pad|>` after the end of a sequence; the model read all but the last column.
        first_target: the first column of `tokens` whose prediction counts; from there on, all that are no padding.
    """

    unit: str
    mode: str
    labels: tuple[str, ...]
    layers: np.ndarray
    indices: np.ndarray
    changes: np.ndarray
    standard_errors: np.ndarray
    documents: np.ndarray
    order: np.ndarray
    loss: float
    batch_losses: np.ndarray
    batch_changes: np.ndarray
    num_targets: np.ndarray
    tokens: np.ndarray
    first_target: int

    @property
    def num_documents(self) -> int:
        return len(np.unique(self.documents))

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for number in self.order:
            yield {
                "layer": int(self.layers[number]),
                self.unit: int(self.indices[number]),
                "change": float(self.changes[number]),
                "standard_error": float(self.standard_errors[number]),
            }


def ablate(
    model: Transformer,
    batches: Sequence[Batch],
    unit: str = "head",
    mode: str = "mean",
    layers: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
    seed: int = 0,
) -> Ablations:
    """Measure the change of the mean loss, `loss(ablated) - loss(clean)`, when one unit's activation is replaced.

    The units are the heads' outputs (`hook_z`), what a feed-forward part or a whole layer adds to the residual stream,
    the neurons' activations (`hook_post`), and the residual stream before a layer at one position. In their place comes

    - `mean`: the mean over all tokens of `batches`, one vector a unit. Wang et al. 2022, "Interpretability in the
      Wild", section 2, take it for each position apart; over all tokens, what a head knows of positions goes too.
    - `zero`: nothing, which the later layers have never seen (Meyes et al. 2019, "Ablation Studies in Artificial Neural
      Networks").
    - `resample`: the activation at the same position of another sequence of the batch, by `draw_donors`; the same one
      for all units, so that they can be compared (Chan et al. 2022, "Causal Scrubbing").

    The layers before a unit are not computed again: what the replacement changes is added to the residual stream that
    the model had there, for many ablations in one forward pass.

    The standard errors are those of `clustered_means`: documents, not windows or batches, are the sampling unit.

    Args:
        model: in evaluation mode.
        batches: inputs and targets, of one width T, padded on the right.
        unit: a name of `UNITS`.
        mode: its replacement, one of `MODES`.
        layers: which layers (None: all).
        indices: which heads, neurons or positions of each (None: all).
        seed: of `resample`.

    Raises:
        LumiereError: no such unit or mode; `resample` with a batch of one sequence.
    """
    kind = find_unit(unit)
    check_choice("mode", mode, MODES)
    if mode == "resample" and min(len(batch.tokens) for batch in batches) < 2:
        raise LumiereError(
            "resample takes activations from another sequence of the batch, and a batch has one only",
            "use mean or zero, or take more sequences",
        )
    layers = range(model.num_layers) if layers is None else layers
    num_units = kind.count(model, batches[0].tokens.shape[1])
    indices = range(num_units) if indices is None else indices
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in batches]
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        means = mean_activations(model, batches, kind, layers) if mode == "mean" else {}
        losses, ablated, receipts = [], [], ()
        for batch in batches:
            trial = Trial(model, batch, kind, layers, mode, means, generator)
            losses.append(trial.losses_B.numpy())
            without_UB = torch.cat([trial.ablated(layer, indices) for layer in layers])
            ablated.append(without_UB.numpy() - losses[-1])
            receipts = receipts or trial.receipts(indices, without_UB)
    num_targets = np.array([batch.num_targets for batch in batches])
    batch_losses = np.array([losses_B.sum() for losses_B in losses]) / num_targets
    counts_S = np.concatenate([(batch.targets != IGNORED).sum(1).cpu().numpy() for batch in batches])
    documents = documents_of(batches)
    changes, standard_errors = clustered_means(np.concatenate(ablated, axis=1), counts_S, documents)
    all_layers, all_indices = np.repeat(layers, len(indices)), np.tile(indices, len(layers))
    return Ablations(
        unit=unit,
        mode=mode,
        labels=tuple(kind.label.format(layer=at, index=i) for at, i in zip(all_layers, all_indices, strict=True)),
        layers=all_layers,
        indices=all_indices,
        changes=changes,
        standard_errors=standard_errors,
        documents=documents,
        order=np.argsort(-changes, kind="stable"),
        loss=float((batch_losses * num_targets).sum() / num_targets.sum()),
        batch_losses=batch_losses,
        batch_changes=np.stack([changes_UB.sum(1) for changes_UB in ablated], axis=1) / num_targets,
        num_targets=num_targets,
        tokens=np.concatenate([whole_rows(batch) for batch in batches]),
        first_target=1 + min(int((batch.targets != IGNORED).any(0).nonzero()[0, 0]) for batch in batches),
        receipts=receipts,
    )


def whole_rows(batch: Batch) -> np.ndarray:
    """Return the inputs and the last target, (B, T + 1); `<|pad|>` for a target that is ignored."""
    last_B1 = batch.targets[:, -1:]
    return torch.cat([batch.tokens, last_B1.where(last_B1 != IGNORED, PAD)], dim=1).cpu().numpy()
