"""`run.inspect`, the causal half: what changes if a part of the computation is changed.

Importing this module loads neither torch nor numpy.
"""

from typing import TYPE_CHECKING, Unpack

from lumiere.api.analysis import Analysis, analyze
from lumiere.api.circuits import Circuits
from lumiere.api.options import Options, Prompt, RunAnalyses
from lumiere.api.target import Indices, InspectTarget, parse_indices
from lumiere.errors import LumiereError, check_choice

if TYPE_CHECKING:
    from lumiere.interpret.ablation import Ablations
    from lumiere.interpret.joint_ablation import JointAblations

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
        together: str | None = None,
        batches: int = 8,
        batch_size: int | None = None,
        **options: Unpack[Options],
    ) -> "Analysis[Ablations | JointAblations]":
        """How the loss changes without a part. Each part is ablated alone, or several together.

        Without a text, over windows of the validation split.

        Args:
            unit: What to ablate: head, feedforward, layer, neuron or position.
            mode: Replacement: mean, zero or resample.
            together: Sets of parts to ablate at once, such as `L0H1+L1H2,L0F+L1N7`, or `pairs`: all pairs of heads.
            batches, batch_size: Validation windows to read.
        """
        from lumiere.interpret.ablation import MODES, ablate, find_unit
        from lumiere.report.figures.bars import draw_ablations

        kind = find_unit(unit)
        check_choice("mode", mode, MODES)
        if together is not None:
            if unit != "head" or any(value is not None for value in (layer, head, neuron, pos)):
                raise LumiereError("--together names its parts itself", "omit --unit and the lists of parts")
            found = self._target(prompt, **options)
            return ablate_sets(found, together, mode, batches, batch_size or BATCH_SIZE)
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


def ablate_sets(
    target: InspectTarget, together: str, mode: str, batches: int, batch_size: int
) -> "Analysis[JointAblations]":
    """Ablate several parts at once."""
    from lumiere.interpret.joint_ablation import ablate_together, parse_parts
    from lumiere.report.figures.bars import draw_joint_ablations

    sets = parse_parts(together, target.opened.model)
    sequences, source = target.batches(batches, batch_size)
    return analyze(
        "ablate",
        target,
        lambda model: ablate_together(model, sequences, sets, mode, target.seed),
        draw_joint_ablations,
        source,
    )
