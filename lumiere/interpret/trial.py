"""One batch, with and without parts of the model.

Shapes: B batch, T position, E embedding_size; U ablations, N ablations of one forward pass, R = N * B rows, D units of
a layer, W width of a unit's activation, P predictions of R rows.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere.components.hooks import hooked, run_with_cache
from lumiere.components.kernels import IGNORED, linear_cross_entropy_losses
from lumiere.data.batches import Batch
from lumiere.data.tokenizer import PAD
from lumiere.interpret.result import Receipt, rounding
from lumiere.interpret.units import Cache, Unit, stream_after
from lumiere.models.transformer import Transformer

TOKENS_AT_ONCE = 2048
"""Of one forward pass: fewer make the products slow, more leave the cache."""


class Trial:
    """One batch: the activations of the model, what replaces them, and the losses with and without.

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
        """(N, B) the sum of the losses of each sequence, for each copy of the batch along R, in float64 on the CPU."""
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
        """The mean over the tokens."""
        return losses_B.sum(-1) / self.batch.num_targets

    def ablated(self, layer: int, indices: Sequence[int]) -> Tensor:
        """(N, B) the sum of each sequence's losses without each of the units of a layer, one at a time."""
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
        """The loss without one unit, by a hook in a whole forward pass."""
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
        """That nothing but the ablation changes the loss, and that the strongest one is what a hook does."""
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
    """By layer the activations that the unit needs, by their names within the block."""
    leaves = (*kind.hooks, f"hook_resid_{kind.stage}")
    _, cache = run_with_cache(model, batch.tokens, {f"blocks.{layer}.{leaf}" for layer in layers for leaf in leaves})
    return {layer: {leaf: cache[f"blocks.{layer}.{leaf}"] for leaf in leaves} for layer in layers}


def mean_activations(
    model: Transformer, batches: Sequence[Batch], kind: Unit, layers: Sequence[int]
) -> dict[int, Tensor]:
    """By layer the mean over all tokens of all batches, padding left out, (D, W); summed in float64."""
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
    """(B, T) whose activation comes in place of each sequence's own: the next one in a circle drawn by chance.

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
