"""Measure the loss without several parts at once: what parts can stand in for each other, which single ablations hide.

Shapes: B batch, T position; S sequences, N sets of units, U units.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumiere.components.hooks import hook_points, hooked, run_with_cache
from lumiere.components.kernels import IGNORED
from lumiere.data.batches import Batch, documents_of
from lumiere.errors import LumiereError, check_choice
from lumiere.evaluation.scoring import clustered_means
from lumiere.interpret.ablation import MODES, UNITS, Trial, draw_donors, mean_activations
from lumiere.interpret.result import Receipt, Result, relative_error, rounding
from lumiere.models.transformer import Transformer

Part = tuple[str, int, int]
"""A name of `UNITS`, a layer and an index."""
LETTERS = {"H": "head", "N": "neuron", "F": "feedforward"}
ALL_PAIRS = "pairs"


def parse_parts(text: str, model: Transformer) -> list[list[Part]]:
    """Return the sets of parts that a text names: `L0H1+L1H2,L0F+L1N7`, or `pairs` for all pairs of heads.

    Raises:
        LumiereError: A name is none, the model lacks the part, or a set has fewer than two parts.
    """
    heads = [("head", layer, head) for layer in range(model.num_layers) for head in range(model.num_heads)]
    if text == ALL_PAIRS:
        return [list(pair) for pair in combinations(heads, 2)]
    sets = [list(dict.fromkeys(parse_part(name, model) for name in names.split("+"))) for names in text.split(",")]
    if any(len(parts) < 2 for parts in sets):
        raise LumiereError("--together takes two different parts or more", "join them with +, such as L0H1+L1H2")
    return sets


def parse_part(name: str, model: Transformer) -> Part:
    """Return the part called such as L1H2, L1N7 or L1F."""
    found = re.fullmatch(r"L(\d{1,4})(?:([HN])(\d{1,7})|F)", name.strip().upper())
    if not found:
        raise LumiereError(
            f"{name.strip()!r} is no part of a model", "write heads as L1H2, neurons as L1N7, feed-forward parts as L1F"
        )
    kind, layer, index = LETTERS[found[2] or "F"], int(found[1]), int(found[3] or 0)
    counts = {"layer": (layer, model.num_layers), kind: (index, UNITS[kind].count(model, 1))}
    for what, (number, count) in counts.items():
        if number >= count:
            raise LumiereError(f"there is no {what} {number} ({name.strip()})", f"the last one is {count - 1}")
    return kind, layer, index


def label_of(part: Part) -> str:
    kind, layer, index = part
    letter = next(letter for letter, name in LETTERS.items() if name == kind)
    return f"L{layer}{letter}" + ("" if kind == "feedforward" else str(index))


@dataclass(frozen=True, kw_only=True)
class JointAblations(Result):
    """The change of the loss without several parts at once, in nats per token, and how it differs from the sum.

    Attributes:
        mode: the replacement, one of `MODES`.
        parts: (U,) each part that occurs in a set.
        changes, standard_errors: (U,) without that part alone; errors are clustered by document, NaN for one document.
        sets: (N,) such as L0H1+L1H2.
        joint, joint_errors: (N,) without all parts of the set.
        interactions, interaction_errors: (N,) the joint change minus the sum of the single ones: above 0 if the parts
            stand in for each other, below 0 if they need each other, 0 if they are independent.
        order: (N,) from the largest to the smallest interaction, by absolute value.
        documents: (S,) which document each sequence is cut from.
        loss: without any ablation.
    """

    mode: str
    parts: tuple[str, ...]
    changes: np.ndarray
    standard_errors: np.ndarray
    sets: tuple[str, ...]
    joint: np.ndarray
    joint_errors: np.ndarray
    interactions: np.ndarray
    interaction_errors: np.ndarray
    order: np.ndarray
    documents: np.ndarray
    loss: float

    @property
    def num_documents(self) -> int:
        return len(np.unique(self.documents))

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for number in self.order:
            yield {
                "set": self.sets[number],
                "joint": float(self.joint[number]),
                "joint_error": float(self.joint_errors[number]),
                "interaction": float(self.interactions[number]),
                "interaction_error": float(self.interaction_errors[number]),
            }


def ablate_together(
    model: Transformer, batches: Sequence[Batch], sets: Sequence[Sequence[Part]], mode: str = "mean", seed: int = 0
) -> JointAblations:
    """Measure the change of the mean loss without all parts of each set, and `I = joint - sum of the single changes`.

    Two parts that do the same, each of them enough, change nothing alone and everything together: I > 0. Two parts in
    series each change everything alone: I < 0. Replacements are those of `ablate`, taken from the run without
    ablations. By hooks in whole forward passes.

    Raises:
        LumiereError: no such mode; `resample` with a batch of one sequence.
    """
    check_choice("mode", mode, MODES)
    if mode == "resample" and min(len(batch.tokens) for batch in batches) < 2:
        raise LumiereError("resample needs two sequences in a batch", "use mean or zero, or take more sequences")
    parts = sorted({part for chosen in sets for part in chosen})
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in batches]
    by_kind = {kind: sorted({at for name, at, _ in parts if name == kind}) for kind, *_ in parts}
    generator, points = torch.Generator().manual_seed(seed), hook_points(model)
    sums, losses = [], []
    with torch.inference_mode():
        means = {
            kind: mean_activations(model, batches, UNITS[kind], layers) if mode == "mean" else {}
            for kind, layers in by_kind.items()
        }
        receipts: tuple[Receipt, ...] = ()
        for batch in batches:
            trial = Trial(model, batch, UNITS["head"], [], "zero", {}, generator)
            new = replacements(model, batch, by_kind, mode, means, generator)

            def without(chosen: Sequence[Part], batch: Batch = batch, new: Any = new, trial: Trial = trial) -> Tensor:
                with hooked(model, hooks_for(chosen, new), points):
                    return trial.sequence_losses(model.final_residual(batch.tokens))[0]

            clean_B = trial.losses_B
            losses.append(clean_B.numpy())
            changed = [without(chosen) - clean_B for chosen in ([part] for part in parts)]
            changed += [without(chosen) - clean_B for chosen in sets]
            sums.append(torch.stack(changed).numpy())
            if not receipts and mode != "resample":
                receipts = (single_receipt(model, batch, parts[0], mode, means, changed[0]),)
    counts_S = np.concatenate([(batch.targets != IGNORED).sum(1).cpu().numpy() for batch in batches])
    documents = documents_of(batches)
    singles_US, joint_NS = np.split(np.concatenate(sums, axis=1), [len(parts)])
    apart_NS = np.stack([singles_US[[parts.index(part) for part in chosen]].sum(0) for chosen in sets])
    changes, joint, interactions = (
        clustered_means(values, counts_S, documents) for values in (singles_US, joint_NS, joint_NS - apart_NS)
    )
    return JointAblations(
        mode=mode,
        parts=tuple(map(label_of, parts)),
        changes=changes[0],
        standard_errors=changes[1],
        sets=tuple("+".join(map(label_of, chosen)) for chosen in sets),
        joint=joint[0],
        joint_errors=joint[1],
        interactions=interactions[0],
        interaction_errors=interactions[1],
        order=np.argsort(-abs(interactions[0]), kind="stable"),
        documents=documents,
        loss=float(np.concatenate(losses).sum() / counts_S.sum()),
        receipts=receipts,
    )


def replacements(
    model: Transformer,
    batch: Batch,
    by_kind: Mapping[str, Sequence[int]],
    mode: str,
    means: Mapping[str, Mapping[int, Tensor]],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return by hook what is put in place of each activation, of the same shape."""
    names = [f"blocks.{layer}.{UNITS[kind].hook}" for kind, layers in by_kind.items() for layer in layers]
    _, cache = run_with_cache(model, batch.tokens, names)
    if mode == "resample":
        donors_BT = draw_donors(batch.is_real.cpu(), generator).to(batch.tokens.device)
        positions = torch.arange(batch.tokens.shape[1], device=donors_BT.device)
        return {name: old[donors_BT, positions] for name, old in cache.items()}
    flat = {f"blocks.{at}.{UNITS[kind].hook}": mean for kind, found in means.items() for at, mean in found.items()}
    return {name: torch.zeros_like(old) + flat.get(name, 0.0) for name, old in cache.items()}


def hooks_for(chosen: Sequence[Part], new: Mapping[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return hooks that replace all parts of a set."""
    places: dict[str, list[Any]] = {}
    for kind, layer, index in chosen:
        place = ... if kind == "feedforward" else np.s_[:, :, index]
        places.setdefault(f"blocks.{layer}.{UNITS[kind].hook}", []).append(place)

    def replace(activation: Tensor, name: str) -> Tensor:
        changed = activation.clone()
        for place in places[name]:
            changed[place] = new[name][place]
        return changed

    return {name: lambda x, name=name: replace(x, name) for name in places}


def single_receipt(
    model: Transformer, batch: Batch, part: Part, mode: str, means: Mapping[str, Mapping[int, Tensor]], found_B: Tensor
) -> Receipt:
    """Check a single ablation by hooks against `ablate`, which adds its change to the recorded stream."""
    kind, layer, index = part
    trial = Trial(model, batch, UNITS[kind], [layer], mode, means[kind], torch.Generator())
    expected_B = trial.ablated(layer, [index])[0] - trial.losses_B
    return Receipt(
        "a single part as in ablate, from the recorded stream", relative_error(found_B, expected_B), rounding(model)
    )
