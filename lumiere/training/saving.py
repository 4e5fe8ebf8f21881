"""What a training writes into its run, besides the metrics."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lumiere import __version__
from lumiere.components.world import World
from lumiere.config.schema import RunConfig
from lumiere.data.dataset import TokenizedCorpus
from lumiere.evaluation.loss import Evaluation
from lumiere.persistence.checkpoint_format import Checkpoint
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run
from lumiere.training.events import CheckpointEvent, Event
from lumiere.training.nonfinite import Guard
from lumiere.training.shards import gathered, held_bytes
from lumiere.training.snapshots import is_snapshot
from lumiere.training.state import NUMERICS, TrainingState


class Saver:
    """Writes checkpoints and snapshots of one run, and keeps its record up to date with them.

    Every process looks whether they are sound, so that all stop where they are not. Rank 0 writes them, or, where they
    are too large for one process, each its share.
    """

    def __init__(
        self,
        run: Run,
        state: TrainingState,
        config: RunConfig,
        corpus: TokenizedCorpus,
        epoch_steps: int,
        tell: Callable[[Event], None],
        guard: Guard,
        world: World,
    ) -> None:
        self._run = run
        self._state = state
        self._epoch_steps = epoch_steps
        self._tell = tell
        self._guard = guard
        self._world = world
        self._writes = world.rank == 0
        fsdp = config.training.parallel == "fsdp"
        self._gather_limit = config.training.gather_limit_gb * 1e9 if fsdp else math.inf
        self._manager = CheckpointManager(run.path.parent)
        self._about = {
            "run": run.name,
            "lumiere_version": __version__,
            "numerics": NUMERICS,
            "config": config.model_dump(),
            "corpus_sha256": corpus.fingerprint,
            "tokenizer_sha256": corpus.tokenizer.fingerprint,
            "world_size": world.size,
        }

    def save(self, name: str, evaluation: Evaluation | None = None) -> None:
        """Write the whole state as `best` or `latest`.

        Args:
            evaluation: the one that made it `best`; the record keeps it, for the model card.

        Raises:
            NonFiniteError: if it is broken; what was there is untouched.
        """
        self._write(name, self._state.to_checkpoint(self._about))
        if not self._writes:
            return
        best: dict[str, Any] = {}
        if evaluation is not None:
            best = {"best_evaluation": {"step": self._state.step} | asdict(evaluation)}
        self._run.update(**progress(self._state, self._epoch_steps), **best)
        self._tell(CheckpointEvent(self._state.step, name))

    def snapshot(self) -> None:
        """Write the weights of this step if they are to be kept, and drop those that no longer are.

        Raises:
            NonFiniteError: if they are broken.
        """
        step = self._state.step
        if not is_snapshot(step, reached=step):
            return
        weights = Checkpoint(self._state.model.state_dict(), metadata=self._about | {"step": step})
        self._write(f"step-{step:08d}", weights)
        if not self._writes:
            return
        for name in self._manager.names(self._run):
            if name.startswith("step-") and not is_snapshot(int(name.removeprefix("step-")), reached=step):
                self._manager.remove(self._run, name)

    def _write(self, name: str, checkpoint: Checkpoint) -> None:
        self._guard.check_checkpoint(checkpoint)
        if held_bytes(checkpoint) > self._gather_limit:
            self._manager.save_shards(self._run, name, checkpoint, self._world)
            return
        checkpoint = gathered(checkpoint, self._world)
        if self._writes:
            self._manager.save(self._run, name, checkpoint)


def progress(state: TrainingState, epoch_steps: int) -> dict[str, Any]:
    """What `run.json` says of a training's progress."""
    return {
        "step": state.step,
        "epoch": state.step / epoch_steps,
        "tokens": state.tokens,
        "training_seconds": state.seconds,
        "best_loss": state.best_loss,
        "best_step": state.best_step,
        "skipped_steps": state.skipped_steps,
    }
