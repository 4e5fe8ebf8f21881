"""`run.inspect`, the causal half: what changes if a part of the computation is changed.

Importing this module loads neither torch nor numpy.
"""

from typing import TYPE_CHECKING, Unpack

from lumiere.api.analysis import Analysis, analyze
from lumiere.api.circuits import Circuits
from lumiere.api.options import Options, Prompt, RunAnalyses
from lumiere.api.target import Indices, parse_indices
from lumiere.errors import LumiereError, check_choice

if TYPE_CHECKING:
    from lumiere.interpret.ablation import Ablations

MANY = 64
"""The number of ablations above which a batch is smaller, so that they do not take minutes."""
BATCH_SIZE, SMALL_BATCH_SIZE = 32, 4


class Causes(Circuits, RunAnalyses):
    """Interventions on a run's model."""

    def ablate(
        self,
        prompt: Prompt = None,
        *,
        unit: str = "head",
        mode: str = "mean",
        layer: Indices = None,
        head: Indices = None,
        neuron: Indices = None,
        pos: Indices = None,
        batches: int = 8,
        batch_size: int | None = None,
        **options: Unpack[Options],
    ) -> "Analysis[Ablations]":
        """How the loss changes without a part. Each part is ablated alone.

        Without a text, over windows of the validation split.

        Args:
            unit: What to ablate: head, feedforward, layer, neuron or position.
            mode: Replacement: mean, zero or resample.
            batches, batch_size: Validation windows to read.
        """
        from lumiere.interpret.ablation import MODES, ablate, find_unit
        from lumiere.report.figures.bars import draw_ablations

        kind = find_unit(unit)
        check_choice("mode", mode, MODES)
        lists = {"head": ("head", head), "neuron": ("neuron", neuron), "position": ("pos", pos)}
        for wanted, (option, value) in lists.items():
            if value is not None and unit != wanted:
                raise LumiereError(f"--{option} needs --unit {wanted}, and the unit is {unit}", f"add --unit {wanted}")
        target = self._target(prompt, **options)
        model, layers = target.opened.model, target.layers(layer)
        _, listed = lists.get(unit, (unit, None))

        def chosen(num_positions: int) -> list[int]:
            return parse_indices(listed, kind.count(model, num_positions), unit)

        if batch_size is None:
            is_many = len(layers) * len(chosen(model.context_size)) > MANY
            batch_size = SMALL_BATCH_SIZE if is_many else BATCH_SIZE
        sequences, source = target.batches(batches, batch_size)
        indices = chosen(sequences[0].tokens.shape[1])
        return analyze(
            "ablate",
            target,
            lambda model: ablate(model, sequences, unit, mode, layers, indices, target.seed),
            draw_ablations,
            source,
        )
