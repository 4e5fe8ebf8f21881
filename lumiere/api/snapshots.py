"""What an analysis along the snapshots of a run reads: the snapshots, and the same texts for all of them."""

from typing import TYPE_CHECKING

from lumiere.api.target import InspectTarget
from lumiere.errors import LumiereError

if TYPE_CHECKING:
    from lumiere.interpret.dynamics import Texts
    from lumiere.models.transformer import Transformer
    from lumiere.persistence.runs import Run

NUM_BATCHES, BATCH_SIZE = 8, 32
"""Validation windows for the loss."""
LENS_WINDOWS = 8
MAX_TOKENS = 2**15
"""Validation tokens for the in-context-learning score and natural repeats of each snapshot."""


def last_snapshot(run: "Run") -> str:
    """Return the name of a run's last snapshot."""
    from lumiere.persistence.checkpoint_manager import NAMES, checkpoint_names

    if run.record.status == "imported":
        raise LumiereError(
            f"run {run.id} was imported: it has no snapshots of its training",
            f"lumiere train CONFIG --from {run.id} makes a run that has some",
        )
    snapshots = [name for name in checkpoint_names(run) if name not in NAMES]
    if not snapshots:
        raise LumiereError(f"run {run.id} has no snapshots", "train with training.snapshots=true and do not prune them")
    return snapshots[-1]


def load_snapshot(target: InspectTarget, step: int, like: "Transformer") -> "Transformer":
    """Load the model at a step, in the type and on the device of another one."""
    from lumiere.persistence.checkpoint_manager import CheckpointManager
    from lumiere.persistence.loading import load_weights

    opened, weight = target.opened, like.token_embedding.weight
    loaded = CheckpointManager(opened.run.path.parent).load(opened.run, str(step), groups=("model",))
    model = load_weights(opened.config, loaded, f"the snapshot of step {step} of run {opened.run.id}")
    return model.to(device=weight.device, dtype=weight.dtype)


def choose_texts(target: InspectTarget, names: list[str], *, is_asked: bool) -> "tuple[Texts, list[str], str]":
    """Return the inputs of all snapshots, the metrics that can be computed from them, and their source.

    Without the corpus, refuse metrics that were asked for by name, and omit others with a note.
    """
    import torch

    from lumiere.interpret.dynamics import METRICS, Texts

    if target.given or any(METRICS[name].needs_tokens for name in names):
        tokens, source = target.scored_sequences()
        sources = [source or f"head scores on the {target.chosen[1]}"]
    else:
        tokens, sources = torch.tensor([[0]]), []
    with_corpus = [name for name in names if METRICS[name].needs_corpus]
    if not with_corpus:
        return Texts(tokens), names, "".join(sources)
    try:
        windows = target.spread_windows(MAX_TOKENS)
        batches, source = target.drawn_batches(NUM_BATCHES, BATCH_SIZE)
        # Only the lens needs full windows, and a split may have none.
        lens_rows = target.full_windows(LENS_WINDOWS)[:, :-1].tolist() if "lens-depth" in names else []
    except LumiereError as error:
        if is_asked:
            raise
        target.note(f"without {', '.join(with_corpus)}: {error.message}")
        return Texts(tokens), [name for name in names if name not in with_corpus], "".join(sources)
    return Texts(tokens, windows, batches, lens_rows), names, "; ".join([*sources, source])
