"""Training loop: forward, backward, update, evaluate, save."""

import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lumiere import __version__
from lumiere.config.schema import RunConfig, TrainingConfig
from lumiere.data.batches import Batch, batch_at, steps_per_epoch
from lumiere.data.dataset import TokenizedCorpus
from lumiere.distributed import SINGLE_PROCESS, ProcessGroup
from lumiere.evaluation.loss import Evaluation, evaluate
from lumiere.persistence.checkpoint import Checkpoint
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run
from lumiere.training.costs import flops_per_token
from lumiere.training.events import (
    Callback,
    CheckpointEvent,
    EvaluationEvent,
    Event,
    StartEvent,
    StepEvent,
    WarningEvent,
)
from lumiere.training.loss import Objective, compiled, summed_loss
from lumiere.training.nonfinite import NonFiniteGuard, is_finite
from lumiere.training.parallel import (
    accumulating,
    distributed,
    evaluating,
    full_tensor,
    gather_checkpoint,
    local_rows,
    nbytes,
    seed_dropout,
)
from lumiere.training.schedule import is_snapshot, learning_rate_factor, num_steps, unfinished_warmup
from lumiere.training.state import NUMERICS, TrainingState, new_model


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended.

    Attributes:
        run: where everything is.
        state: as it was at the end.
        evaluation: the last one (None: interrupted before the first).
        signal_number: of the signal that interrupted it (None: it came to its end).
    """

    run: Run
    state: TrainingState
    evaluation: Evaluation | None
    signal_number: int | None


def train(
    config: RunConfig,
    corpus: TokenizedCorpus,
    run: Run,
    device: torch.device,
    precision: torch.dtype,
    peak_flops: float,
    callbacks: Sequence[Callback] = (),
    checkpoint: Checkpoint | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> TrainingResult:
    """Train until the last step, or until patience is exhausted, or until a signal.

    Args:
        corpus: the splits `train` and `validation` in ids.
        run: where checkpoints go.
        precision: type of the matrix products; the weights are float32.
        peak_flops: FLOP/s of the device in that type, of all processes' together, which `mfu` is a share of.
        callbacks: called with each event, in order.
        checkpoint: the state to go on from (None: from the start). The result on a CPU is, bit for bit, that of a
            training which never stopped, on the same machine with the same number of threads and processes.
        processes: the processes that train together, each of which calls this; rank 0 alone writes.

    Raises:
        NonFiniteError: if the loss, the gradients or the weights are no longer finite.
    """
    settings = config.training
    windows = corpus.windows("train", config)
    validation = corpus.windows("validation", config)
    epoch_steps = steps_per_epoch(windows, settings.batch_size)
    total_steps = num_steps(settings, epoch_steps)

    def emit(event: Event) -> None:
        for callback in callbacks:
            callback(event)

    objective: Objective = summed_loss
    if settings.compile:
        objective = compiled(lambda message: emit(WarningEvent(state.step, message)))
    model = new_model(config)
    objective = distributed(model, objective, settings.parallel, device, processes)
    state = TrainingState.around(model, settings, precision)
    if checkpoint is not None:
        state.restore(local_rows(checkpoint, model, processes))
        # Afresh, because the settings may allow more, or less, than those it was saved with.
        state.stop_reason = reason_to_stop(state, settings, total_steps)

    guard = NonFiniteGuard(run, state, settings, precision, windows, emit)
    saver = Saver(run, state, config, corpus, epoch_steps, emit, guard, processes)

    names = (run.name, state.step, total_steps, epoch_steps, state.model.num_parameters, len(windows))
    emit(StartEvent(*names, str(device), str(precision).removeprefix("torch."), peak_flops))
    if message := unfinished_warmup(settings.warmup_steps, total_steps):
        emit(WarningEvent(state.step, message))
    if state.step == 0 and settings.snapshots:
        saver.snapshot()
    evaluation = None
    reported = (state.tokens, state.seconds)
    state.model.train()

    with GracefulStop() as interruption:
        while state.stop_reason is None:
            started = time.perf_counter()
            share = (processes.rank, processes.size)
            batch = batch_at(state.step, windows, settings.batch_size, settings.seed, *share).to(device)
            seed_dropout(settings.seed, state.step, processes)
            plan = (total_steps, settings.warmup_steps, settings.schedule, settings.decay_fraction)
            factor = learning_rate_factor(state.step + 1, *plan)
            loss, grad_norm = train_step(state, batch, factor, settings, precision, objective, processes)
            guard.check_step(loss, grad_norm)
            state.step += 1
            state.tokens += batch.num_targets
            state.seconds += time.perf_counter() - started

            is_last = state.step >= total_steps
            ends_epoch = state.step % epoch_steps == 0
            progress = (state.step, state.step / epoch_steps, state.tokens, state.seconds)
            if is_last or state.step % settings.log_interval == 0:
                speed = (state.tokens - reported[0]) / (state.seconds - reported[1])
                mfu = speed * flops_per_token(config) / peak_flops
                emit(StepEvent(*progress, loss, settings.learning_rate * factor, grad_norm, speed, mfu))
                reported = (state.tokens, state.seconds)

            evaluates = is_last or ends_epoch or is_due(settings.eval_interval, state.step)
            if evaluates:
                facts = corpus.splits["validation"].facts
                with state.averaged_model() as model, evaluating(objective):
                    evaluation = evaluate(model, validation, facts, settings.batch_size, processes)
                guard.check_evaluation(evaluation.loss)
                is_best = state.record_evaluation(evaluation.loss)
                if ends_epoch:
                    state.record_epoch(evaluation.loss, settings.stopping_threshold)
                state.stop_reason = reason_to_stop(state, settings, total_steps)
                emit(EvaluationEvent(*progress, evaluation, is_best))
                if is_best:
                    saver.save("best", evaluation)
            if settings.snapshots:
                saver.snapshot()
            # By one decision: the others wait for a process that stops a step earlier.
            signal_number = processes.all_reduce_max(interruption.signal_number or 0)
            interrupted = signal_number != 0 and state.stop_reason is None
            # The last of this step's files: once it is there, nothing of the step is missing after a kill.
            if evaluates or interrupted or is_due(settings.checkpoint_interval, state.step):
                saver.save("latest")
            if interrupted:
                return TrainingResult(run, state, evaluation, signal_number)
    return TrainingResult(run, state, evaluation, None)


def reason_to_stop(state: TrainingState, settings: TrainingConfig, total_steps: int) -> str | None:
    """Why training is over, as the state is now; None where it is not."""
    if state.step >= total_steps:
        return "max_steps" if settings.max_steps else "max_epochs"
    if settings.patience and state.epochs_without_improvement >= settings.patience:
        return "patience"
    return None


def train_step(
    state: TrainingState,
    batch: Batch,
    factor: float,
    settings: TrainingConfig,
    precision: torch.dtype,
    objective: Objective,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> tuple[float, float]:
    """One update of the weights; none if the loss or the gradients are not finite, which are then left to look at.

    Args:
        batch: this process' share of the step's windows.
        factor: share of the peak learning rates.
        objective: from `distributed`, where there are several processes.

    Returns:
        The batch's mean loss in nats, and the norm of its gradients before clipping.
    """
    device, bfloat16 = batch.tokens.device.type, precision == torch.bfloat16
    # A cache would keep every weight in bfloat16 until the end of the forward pass, whose use of each is its only one.
    autocast = torch.autocast(device, torch.bfloat16, enabled=bfloat16, cache_enabled=False)
    loss_sum = torch.zeros((), device=batch.tokens.device)
    parts = batch.split(settings.gradient_accumulation_steps, fills=processes.size > 1)
    for number, part in enumerate(parts, start=1):
        with autocast, accumulating(objective, is_last=number == len(parts)):
            loss = objective(state.model, part.tokens, part.targets) / batch.num_targets
        loss.backward()
        if device == "cuda":
            # The GPU waits for the gradients of all ranks without a word; meet first, where a rank that hangs is named.
            processes.barrier()
        loss_sum += loss.detach()
    limit = settings.gradient_clip_norm or math.inf
    norm = full_tensor(get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None]))
    # Read both at once: each read waits for the device.
    total, grad_norm = torch.stack([loss_sum, norm]).tolist()
    total = processes.all_reduce_sum(total)
    # In two halves, because clipping by a norm that is not finite would make every gradient NaN.
    if is_finite(total, grad_norm):
        if grad_norm > limit:
            clip_grads_with_norm_(state.model.parameters(), limit, norm)
        state.update(factor)
    return total, grad_norm


def is_due(interval: int | None, step: int) -> bool:
    """Whether something that happens every `interval` steps happens at `step`."""
    return interval is not None and step % interval == 0


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
        emit: Callable[[Event], None],
        guard: NonFiniteGuard,
        processes: ProcessGroup,
    ) -> None:
        self._run = run
        self._state = state
        self._epoch_steps = epoch_steps
        self._emit = emit
        self._guard = guard
        self._processes = processes
        self._writes = processes.rank == 0
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
            "world_size": processes.size,
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
        self._emit(CheckpointEvent(self._state.step, name))

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
        if nbytes(checkpoint) > self._gather_limit:
            self._manager.save_shards(self._run, name, checkpoint, self._processes)
            return
        checkpoint = gather_checkpoint(checkpoint, self._processes)
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


class GracefulStop:
    """While it is entered, the first signal only sets `signal_number`; the next one acts as if there were no handler.

    Signals reach the main thread only, so in other threads this does nothing.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
