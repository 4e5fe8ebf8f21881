"""Training loop: forward, backward, update, evaluate, save."""

import math
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Self

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lumiere import __version__
from lumiere.config.schema import TrainingConfig
from lumiere.data.batches import Batch, batch_at
from lumiere.distributed import SINGLE_PROCESS, ProcessGroup
from lumiere.evaluation.loss import Evaluation, evaluate
from lumiere.persistence.checkpoint import Checkpoint
from lumiere.persistence.checkpoint_manager import CheckpointManager, snapshot_steps
from lumiere.persistence.runs import Run
from lumiere.persistence.step_folders import snapshot_name
from lumiere.training.costs import flops_per_token
from lumiere.training.events import (
    Callback,
    CheckpointEvent,
    EvaluationEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
)
from lumiere.training.freezing import described
from lumiere.training.loss import Objective, compiled, summed_loss
from lumiere.training.nonfinite import NonFiniteGuard, is_finite
from lumiere.training.parallel import (
    accumulating,
    evaluating,
    full_tensor,
    gather_checkpoint,
    local_device,
    local_rows,
    nbytes,
    parallelize,
    seed_dropout,
)
from lumiere.training.schedule import is_snapshot, learning_rate_factor, unfinished_warmup
from lumiere.training.setup import TrainingSetup
from lumiere.training.state import NUMERICS, StopReason, TrainingState, new_model


@dataclass(frozen=True)
class TrainingResult:
    """How a training run ended.

    Attributes:
        evaluation: The last one. None: interrupted before the first.
        signal_number: The signal that interrupted the run. None: it ran to its end.
    """

    run: Run
    state: TrainingState
    evaluation: Evaluation | None
    signal_number: int | None


class Trainer:
    """Trains one run until its last step, until patience is exhausted, or until a signal.

    Every process of a distributed job has a trainer. Rank 0 writes the checkpoints, or each rank its own rows if they
    are too large to gather.

    Args:
        run: Receives the checkpoints.
        emit: Called with each event.
        checkpoint: The state to resume from. None: start from step 0. On a CPU the result is bit-identical to an
            uninterrupted run on the same machine with the same number of threads and processes.
        processes: The processes that train together.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        run: Run,
        emit: Callback,
        checkpoint: Checkpoint | None = None,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        config = setup.config
        self.setup = setup
        self.settings = config.training
        self.run = run
        self.emit = emit
        self.processes = processes
        self.device = local_device(setup.device, processes)
        self.windows = setup.corpus.windows("train", config)
        self.validation = setup.corpus.windows("validation", config)
        self.epoch_steps = setup.epoch_steps
        self.total_steps = setup.total_steps
        self.peak_flops = setup.peak_flops * processes.size
        self.evaluation: Evaluation | None = None
        self.checkpoints = CheckpointManager(run.path.parent)
        self.provenance = provenance(setup, run, processes)
        model = new_model(config)
        if setup.lineage and checkpoint is None:
            # The parent's weights, which `start` has copied.
            model.load_state_dict(run.load_model(snapshot_name(0)).state_dict())
        objective: Objective = compiled(self.warn) if self.settings.compile else summed_loss
        self.objective = parallelize(model, objective, self.settings.parallel, self.device, processes)
        self.state = TrainingState.around(model, self.settings, setup.precision)
        self.guard = NonFiniteGuard(setup, run, self.state, emit)
        if checkpoint is not None:
            self.state.restore(local_rows(checkpoint, model, processes))
            # Again, because the settings may allow more steps, or fewer, than those it was saved with.
            self.state.stop_reason = self.reason_to_stop()
        self._logged = (self.state.tokens, self.state.seconds)

    def train(self) -> TrainingResult:
        """Train to the end. Returns when all processes have finished.

        Raises:
            NonFiniteError: The loss, the gradients or the weights are not finite.
        """
        state, signal_number = self.state, 0
        self.announce_start()
        if state.step == 0:
            self.save_snapshot()
        state.model.train()
        with GracefulStop() as stop:
            while state.stop_reason is None and not signal_number:
                self.step()
                is_last, ends_epoch = state.step >= self.total_steps, state.step % self.epoch_steps == 0
                evaluates = is_last or ends_epoch or is_due(self.settings.eval_interval, state.step)
                is_best = evaluates and self.evaluate(ends_epoch)
                self.save_snapshot()
                # One decision for all ranks: they would wait for a rank that stops a step earlier.
                received = self.processes.all_reduce_max(stop.signal_number or 0)
                signal_number = received if state.stop_reason is None else 0
                # Last: once it exists, a kill loses nothing of the step.
                if evaluates or signal_number or is_due(self.settings.checkpoint_interval, state.step):
                    self.save(["best", "latest"] if is_best else ["latest"])
        self.processes.barrier()
        return TrainingResult(self.run, state, self.evaluation, signal_number or None)

    def step(self) -> None:
        """Update the weights by the next batch, and report the step if it is due."""
        state, settings, processes = self.state, self.settings, self.processes
        started = time.perf_counter()
        batch = batch_at(
            state.step, self.windows, settings.batch_size, settings.seed, processes.rank, processes.size
        ).to(self.device)
        seed_dropout(settings.seed, state.step, processes)
        factor = learning_rate_factor(state.step + 1, self.total_steps, settings)
        loss, grad_norm = train_step(state, batch, factor, settings, self.setup.precision, self.objective, processes)
        self.guard.check_step(loss, grad_norm)
        state.step += 1
        state.tokens += batch.num_targets
        state.seconds += time.perf_counter() - started
        if state.step >= self.total_steps or state.step % settings.log_interval == 0:
            self.log(loss, settings.learning_rate * factor, grad_norm)

    def evaluate(self, ends_epoch: bool) -> bool:
        """Score the validation split, and decide whether training is over; return whether it is a new best."""
        state = self.state
        with state.averaged_model() as model, evaluating(self.objective):
            facts = self.setup.corpus.splits["validation"].facts
            evaluation = evaluate(model, self.validation, facts, self.settings.batch_size, self.processes)
        self.guard.check_evaluation(evaluation.loss)
        is_best = state.record_evaluation(evaluation.loss)
        if ends_epoch:
            state.record_epoch(evaluation.loss, self.settings.stopping_threshold)
        state.stop_reason = self.reason_to_stop()
        self.evaluation = evaluation
        self.emit(EvaluationEvent(**self.position(), evaluation=evaluation, is_best=is_best))
        return is_best

    def reason_to_stop(self) -> StopReason | None:
        """Return why training is over in the current state; None if it is not."""
        if self.state.step >= self.total_steps:
            return "max_steps" if self.settings.max_steps else "max_epochs"
        if self.settings.patience and self.state.epochs_without_improvement >= self.settings.patience:
            return "patience"
        return None

    # Saving

    def save(self, names: Sequence[str]) -> None:
        """Write the whole state as `latest`, or as `best` and `latest`, and bring the run's record up to date.

        Raises:
            NonFiniteError: The state is broken; the checkpoint before is untouched.
        """
        self.write(names, self.state.to_checkpoint(self.provenance))
        if self.processes.rank:
            return
        best: dict[str, Any] = {}
        if "best" in names and self.evaluation is not None:
            best = {"best_evaluation": {"step": self.state.step} | asdict(self.evaluation)}
        self.run.update(**self.progress(), **best)
        for name in names:
            self.emit(CheckpointEvent(self.state.step, name))

    def save_snapshot(self) -> None:
        """Write the weights of this step if the schedule keeps them, and remove those that it no longer keeps.

        Raises:
            NonFiniteError: The weights are broken.
        """
        step = self.state.step
        if not self.settings.snapshots or not is_snapshot(step, reached=step):
            return
        weights = Checkpoint(self.state.model.state_dict(), metadata=self.provenance | {"step": step})
        self.write([snapshot_name(step)], weights)
        if self.processes.rank == 0:
            steps = [kept for kept in snapshot_steps(self.run) if not is_snapshot(kept, reached=step)]
            self.checkpoints.remove(self.run, *map(snapshot_name, steps))

    def write(self, names: Sequence[str], checkpoint: Checkpoint) -> None:
        """Write a checkpoint from rank 0, or from all ranks if it is too large to gather."""
        # All ranks check, so that all stop.
        self.guard.check_checkpoint(checkpoint)
        sharded = self.settings.parallel == "fsdp"
        if sharded and nbytes(checkpoint) > self.settings.gather_limit_gb * 1e9:
            self.checkpoints.save(self.run, names, checkpoint, self.processes)
            return
        checkpoint = gather_checkpoint(checkpoint, self.processes)
        if self.processes.rank == 0:
            self.checkpoints.save(self.run, names, checkpoint)

    def progress(self) -> dict[str, Any]:
        """Return the part of `run.json` that changes with every save."""
        state = self.state
        return {
            "step": state.step,
            "epoch": state.step / self.epoch_steps,
            "tokens": state.tokens,
            "training_seconds": state.seconds,
            "best_loss": state.best_loss,
            "best_step": state.best_step,
            "skipped_steps": state.skipped_steps,
        }

    # Events

    def warn(self, message: str) -> None:
        """Emit a warning about the current step."""
        self.emit(WarningEvent(self.state.step, message))

    def announce_start(self) -> None:
        """Emit the start event, and warn of a warm-up that is longer than training."""
        event = StartEvent(
            run_name=self.run.name,
            step=self.state.step,
            total_steps=self.total_steps,
            steps_per_epoch=self.epoch_steps,
            num_parameters=self.setup.num_parameters,
            num_windows=len(self.windows),
            device=str(self.device),
            precision=self.setup.resolved["precision"],
            peak_flops=self.peak_flops,
            frozen=described(self.state.model, self.settings.freeze),
        )
        self.emit(event)
        if message := unfinished_warmup(self.settings.warmup_steps, self.total_steps):
            self.warn(message)

    def log(self, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Emit the metrics of the step, with the speed since the step that was reported before."""
        tokens, seconds = self._logged
        speed = (self.state.tokens - tokens) / (self.state.seconds - seconds)
        event = StepEvent(
            **self.position(),
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens_per_second=speed,
            mfu=speed * flops_per_token(self.setup.config) / self.peak_flops,
        )
        self.emit(event)
        self._logged = (self.state.tokens, self.state.seconds)

    def position(self) -> dict[str, Any]:
        """Return how far training is, as events report it."""
        state = self.state
        return {
            "step": state.step,
            "epoch": state.step / self.epoch_steps,
            "tokens": state.tokens,
            "seconds": state.seconds,
        }


def provenance(setup: TrainingSetup, run: Run, processes: ProcessGroup) -> dict[str, Any]:
    """Return what every checkpoint of a run says of its origin."""
    return {
        "run": run.name,
        "lumiere_version": __version__,
        "numerics": NUMERICS,
        "config": setup.config.model_dump(),
        "corpus_sha256": setup.corpus.fingerprint,
        "tokenizer_sha256": setup.corpus.tokenizer.fingerprint,
        "world_size": processes.size,
        **({"parent": dict(setup.lineage)} if setup.lineage else {}),
    }


def train_step(
    state: TrainingState,
    batch: Batch,
    factor: float,
    settings: TrainingConfig,
    precision: torch.dtype,
    objective: Objective,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> tuple[float, float]:
    """Update the weights once. If the loss or the gradients are not finite, leave both untouched for inspection.

    Args:
        batch: This process' share of the step's windows.
        factor: Fraction of the peak learning rates.
        objective: From `parallelize` if there are several processes.

    Returns:
        The batch's mean loss in nats, and the norm of its gradients before clipping.
    """
    device, bfloat16 = batch.tokens.device.type, precision == torch.bfloat16
    # A cache would keep every weight in bfloat16 until the end of the forward pass, which uses each weight once.
    autocast = torch.autocast(device, torch.bfloat16, enabled=bfloat16, cache_enabled=False)
    loss_sum = torch.zeros((), device=batch.tokens.device)
    parts = batch.split(settings.gradient_accumulation_steps, fills=processes.size > 1)
    for number, part in enumerate(parts, start=1):
        with autocast, accumulating(objective, is_last=number == len(parts)):
            loss = objective(state.model, part.tokens, part.targets) / batch.num_targets
        loss.backward()
        if device == "cuda":
            # The GPU waits silently for the gradients of all ranks. Meet here first: this wait names a rank that hangs.
            processes.barrier()
        loss_sum += loss.detach()
    limit = settings.gradient_clip_norm or math.inf
    norm = full_tensor(get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None]))
    # One read for both: each read waits for the device.
    total, grad_norm = torch.stack([loss_sum, norm]).tolist()
    total = processes.all_reduce_sum(total)
    # Clip in two steps: scaling by a non-finite norm would turn every gradient into NaN.
    if is_finite(total, grad_norm):
        if grad_norm > limit:
            clip_grads_with_norm_(state.model.parameters(), limit, norm)
        state.update(factor)
    return total, grad_norm


def is_due(interval: int | None, step: int) -> bool:
    """Return whether `step` is a multiple of `interval`; never for None."""
    return interval is not None and step % interval == 0


class GracefulStop:
    """Let the first Ctrl-C or SIGTERM set `signal_number` only; the second one acts as without a handler.

    Signals reach the main thread only. In other threads this does nothing.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
