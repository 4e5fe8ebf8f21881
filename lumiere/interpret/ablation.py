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
from torch import Tensor, nn

from lumiere.components.hooks import hooked, run_with_cache
from lumiere.components.kernels import IGNORED, linear_cross_entropy_losses
from lumiere.components.layers import Block, feedforward_of
from lumiere.data.batches import Batch, documents_of
from lumiere.errors import LumiereError, check_choice
from lumiere.evaluation.scoring import clustered_means
from lumiere.interpret.result import Receipt, Result, relative_error, rounding, selected, whole_rows
from lumiere.models.transformer import Transformer


@dataclass(frozen=True)
class Unit:
    """A kind of part that can be ablated.

    Attributes:
        label: how unit `index` of a layer is called.
        hook: the activation that is replaced, without `blocks.<layer>.`: (B, T, E), or with an axis of units.
        stage: where in a block the change enters the residual stream: `hook_resid_pre`, `_mid` or `_post`. Where the
            feed-forward part does not read what attention writes, there is no `_mid`, and it is `_post`.
        axis: the axis of the units in the activation; None: the layer has one unit.
        output: the matrix that writes the units to the stream; None: the activation itself is written.
        subtracted: another activation, less which `hook` is what the unit adds; None: `hook` is.
    """

    label: str
    hook: str
    stage: Literal["pre", "mid", "post"]
    axis: int | None = None
    output: Callable[[Block], nn.Linear] | None = None
    subtracted: str | None = None

    def count(self, model: Transformer, num_positions: int) -> int:
        """Return the number of units in a layer.

        Raises:
            LumiereError: the model has no feed-forward parts, and the units are in them.
        """
        if self.hook in ("hook_mlp_out", "mlp.hook_post"):
            feedforward_of(model.blocks[0])
        sizes = {"attn.hook_z": model.num_heads, "mlp.hook_post": model.d_ff, "hook_resid_pre": num_positions}
        return sizes.get(self.hook, 1)

    def stage_in(self, model: Transformer) -> str:
        """Return the stage at which a change enters the stream of this model."""
        return "post" if self.stage == "mid" and model.blocks[0].hook_resid_mid is None else self.stage

    def activations(self, model: Transformer, batch: Batch, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return, by layer, what is replaced, and the residual stream at `stage`, (B, T, E)."""
        stream = f"hook_resid_{self.stage_in(model)}"
        leaves = [leaf for leaf in (self.hook, self.subtracted, stream) if leaf is not None]
        names = {f"blocks.{layer}.{leaf}" for layer in layers for leaf in leaves}
        _, cache = run_with_cache(model, batch.tokens, names)
        found = {}
        for layer in layers:
            replaced, *others = (cache[f"blocks.{layer}.{leaf}"] for leaf in leaves)
            found[layer] = replaced if self.subtracted is None else replaced - others[0], others[-1]
        return found

    def written(self, block: Block, change: Tensor, indices: Sequence[int]) -> Tensor:
        """Return what a change of each of these units, and of no other, adds to the stream, (N, B, T, E).

        Args:
            change: of the activation that is replaced.
        """
        if self.output is not None:
            change_BTUW = change.unsqueeze(-1) if change.ndim == 3 else change
            weight_UWE = self.output(block).weight.T.unflatten(0, (change.shape[2], -1))
            return torch.einsum("btnw,nwe->nbte", change_BTUW[:, :, list(indices)], weight_UWE[list(indices)])
        if self.axis is None:
            return change.expand(len(indices), *change.shape)
        chosen_NT = torch.eye(change.shape[1], dtype=change.dtype, device=change.device)[list(indices)]
        return torch.einsum("nt,bte->nbte", chosen_NT, change)


UNITS: Mapping[str, Unit] = {
    "head": Unit("L{layer}H{index}", "attn.hook_z", "mid", 2, lambda block: block.attention.output),
    "feedforward": Unit("L{layer} feed-forward", "hook_mlp_out", "post"),
    "layer": Unit("L{layer}", "hook_resid_post", "post", subtracted="hook_resid_pre"),
    "neuron": Unit("L{layer}N{index}", "mlp.hook_post", "post", 2, lambda block: feedforward_of(block).down),
    "position": Unit("L{layer}P{index}", "hook_resid_pre", "pre", 1),
}


def find_unit(name: str) -> Unit:
    """Return the unit of that name.

    Raises:
        LumiereError: there is no such unit.
    """
    check_choice("unit", name, UNITS)
    return UNITS[name]


def stream_after(model: Transformer, layer: int, stage: str, resid_BTE: Tensor) -> Tensor:
    """Return the normalized final residual stream, (B, T, E), given the stream at a stage of a block."""
    if stage == "pre":
        return model.continue_from(resid_BTE, layer)
    if stage == "mid":
        resid_BTE = model.blocks[layer].add_feedforward(resid_BTE, resid_BTE)
    return model.continue_from(resid_BTE, layer + 1)


TOKENS_AT_ONCE = 2048
"""Of one forward pass: fewer make the products slow, more leave the cache."""


class Trial:
    """One batch: the model's activations, their replacements, and the losses with and without each unit.

    Args:
        means: by layer, from `mean_activations`; of mode `mean`.
        generator: of mode `resample`; each trial draws its donors once, for all units.
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
        self.losses_B = self.sequence_losses(model.final_residual(batch.tokens))[0]
        donors_BT = draw_donors(batch.is_real.cpu(), generator) if mode == "resample" else None
        self.streams: dict[int, Tensor] = {}
        self.changes: dict[int, Tensor] = {}
        for layer, (old, self.streams[layer]) in kind.activations(model, batch, layers).items():
            if donors_BT is not None:
                new = old[donors_BT.to(old.device), torch.arange(old.shape[1], device=old.device)]
            else:
                new = means.get(layer, 0.0)
            self.changes[layer] = new - old

    def sequence_losses(self, residual_RTE: Tensor) -> Tensor:
        """Sum the losses of each sequence, (N, B), for each copy of the batch along R, in float64 on the CPU."""
        targets_BT = self.batch.targets
        num_copies = len(residual_RTE) // len(targets_BT)
        is_real_RT = (targets_BT != IGNORED).repeat(num_copies, 1)
        targets_P = targets_BT.repeat(num_copies, 1)[is_real_RT]
        # Tokens that are not predicted, such as a first copy, need no logits, which are most of the work.
        losses_P = linear_cross_entropy_losses(residual_RTE[is_real_RT], self.model.unembedding, targets_P)
        sums_R = torch.zeros(len(is_real_RT), dtype=torch.float64)
        sums_R.index_add_(0, is_real_RT.nonzero()[:, 0].cpu(), losses_P.cpu().double())
        return sums_R.view(num_copies, -1)

    def _loss(self, losses_B: Tensor) -> Tensor:
        """Return the mean over the tokens."""
        return losses_B.sum(-1) / self.batch.num_targets

    def ablated(self, layer: int, indices: Sequence[int]) -> Tensor:
        """Sum each sequence's losses without each unit of a layer, one at a time, (N, B)."""
        at_once = max(1, TOKENS_AT_ONCE // self.batch.tokens.numel())
        losses = []
        for first in range(0, len(indices), at_once):
            chosen = indices[first : first + at_once]
            written_NBTE = self.kind.written(self.model.blocks[layer], self.changes[layer], chosen)
            copies_RTE = (self.streams[layer] + written_NBTE).flatten(0, 1)
            losses.append(
                self.sequence_losses(stream_after(self.model, layer, self.kind.stage_in(self.model), copies_RTE))
            )
        return torch.cat(losses)

    def by_hook(self, layer: int, index: int) -> Tensor:
        """Return the loss without one unit, by a hook in a whole forward pass."""
        axis = self.kind.axis
        place = (...,) if axis is None else (*[slice(None)] * axis, index)

        def replace(activation: Tensor) -> Tensor:
            changed = activation.clone()
            changed[place] += self.changes[layer][place]
            return changed

        with hooked(self.model, {f"blocks.{layer}.{self.kind.hook}": replace}):
            logits = self.model(self.batch.tokens).logits.flatten(0, 1).cpu().double()
        targets = self.batch.targets.flatten().cpu()
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / self.batch.num_targets

    def receipts(self, indices: Sequence[int], ablated_UB: Tensor) -> tuple[Receipt, ...]:
        """Check that nothing but the ablation changes the loss, and recompute the strongest ablation by a hook."""
        clean, ablated_U = self._loss(self.losses_B), self._loss(ablated_UB)
        stage = self.kind.stage_in(self.model)
        streams = [stream_after(self.model, layer, stage, x) for layer, x in self.streams.items()]
        again = [self._loss(self.sequence_losses(stream)[0]) for stream in streams]
        strongest = int((ablated_U - clean).abs().argmax())
        row, column = divmod(strongest, len(indices))
        by_hook = self.by_hook(list(self.streams)[row], indices[column])
        errors = {
            "the loss with nothing ablated": max(relative_error(loss, clean) for loss in again),
            "the strongest ablation, by a hook in a whole forward pass": relative_error(ablated_U[strongest], by_hook),
        }
        return tuple(Receipt(check, error, rounding(self.model)) for check, error in errors.items())


def mean_activations(
    model: Transformer, batches: Sequence[Batch], kind: Unit, layers: Sequence[int]
) -> dict[int, Tensor]:
    """Return for each layer the mean of what is replaced over all tokens but padding, summed in float64."""
    sums: dict[int, Tensor] = {}
    for batch in batches:
        real_BT = batch.is_real
        for layer, (replaced, _) in kind.activations(model, batch, layers).items():
            sums[layer] = sums.get(layer, 0.0) + replaced[real_BT].cpu().double().sum(0)
    num_tokens = sum(int(batch.is_real.sum()) for batch in batches)
    weight = model.unembedding
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
    """The effect of each ablation on the loss, in nats per token: positive if the part helps.

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
        first_target: the first column of `tokens` whose prediction counts; from there on, all but padding count.
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
        columns = {"layer": self.layers, self.unit: self.indices}
        columns |= {"change": self.changes, "standard_error": self.standard_errors}
        return ({name: values[number].item() for name, values in columns.items()} for number in self.order)


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
    the neurons' activations (`hook_post`), and the residual stream before a layer at one position. They are replaced by

    - `mean`: the mean over all tokens of `batches`, one vector per unit. Wang et al. 2022, "Interpretability in the
      Wild", section 2, average each position separately; a mean over all tokens also removes what depends on position.
    - `zero`: zero, an input that the later layers have never seen (Meyes et al. 2019, "Ablation Studies in Artificial
      Neural Networks").
    - `resample`: the activation at the same position of another sequence of the batch, by `draw_donors`; the same one
      for all units, so that they can be compared (Chan et al. 2022, "Causal Scrubbing").

    The layers before a unit are not computed again: the change is added to the residual stream that the model had
    there, for many ablations in one forward pass. Standard errors are clustered by document (`clustered_means`).

    Args:
        batches: inputs and targets, of one width T, padded on the right.
        unit: a name of `UNITS`.
        mode: its replacement, one of `MODES`.
        layers, indices: which layers, and which heads, neurons or positions of each (None: all).
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
    layers = selected(layers, model.num_layers)
    indices = selected(indices, kind.count(model, batches[0].tokens.shape[1]))
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
