"""What the loss is without a part of the model: every head, feed-forward part, layer, neuron or position in turn.

Shapes: T position, U ablations, M batches, S sequences.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from lumiere.components.kernels import IGNORED
from lumiere.data.batches import Batch, documents_of
from lumiere.data.tokenizer import PAD
from lumiere.errors import LumiereError, nearest
from lumiere.evaluation.scoring import clustered_means
from lumiere.interpret.result import Result
from lumiere.interpret.trial import Trial, mean_activations
from lumiere.interpret.units import find_unit
from lumiere.models.transformer import Transformer

Mode = Literal["mean", "zero", "resample"]


@dataclass(frozen=True, kw_only=True)
class Ablations(Result):
    """What each ablation does to the loss, in nats a token: positive where the part was of use.

    Attributes:
        unit: what is taken away, a name of `UNITS`.
        mode: what is put in its place.
        labels: (U,) such as L1H3.
        layers: (U,) counted from 0.
        indices: (U,) which of the layer's units, counted from 0.
        changes: (U,) mean loss with the ablation less that without.
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
    """The change of the mean loss, `loss(ablated) - loss(clean)`, when the activation of one unit is replaced.

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
        mode: what comes in its place.
        layers: which layers (None: all).
        indices: which heads, neurons or positions of each (None: all).
        seed: of `resample`.

    Raises:
        LumiereError: no such unit or mode; `resample` with a batch of one sequence.
    """
    kind = find_unit(unit)
    check_mode(mode)
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


def check_mode(mode: str) -> None:
    """Refuses what is no mode.

    Raises:
        LumiereError: so it is.
    """
    modes = get_args(Mode)
    if mode not in modes:
        guess = nearest(mode, modes)
        raise LumiereError(f"there is no mode {mode!r}", f"did you mean {guess}?" if guess else ", ".join(modes))


def whole_rows(batch: Batch) -> np.ndarray:
    """(B, T + 1) the inputs and the last target, `<|pad|>` where there is none."""
    last_B1 = batch.targets[:, -1:]
    return torch.cat([batch.tokens, last_B1.where(last_B1 != IGNORED, PAD)], dim=1).cpu().numpy()
