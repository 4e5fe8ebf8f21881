"""The training loop."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lumiere.components.world import ALONE, World
from lumiere.config.schema import RunConfig, TrainingConfig
from lumiere.data.batches import Batch, batch_at, steps_per_epoch
from lumiere.data.dataset import TokenizedCorpus
from lumiere.evaluation.loss import Evaluation, evaluate
from lumiere.persistence.checkpoint_format import Checkpoint
from lumiere.persistence.runs import Run
from lumiere.training.costs import flops_per_token, num_steps
from lumiere.training.distributed import accumulating, distributed, evaluating, seed_dropout
from lumiere.training.events import EvaluationEvent, Event, Listener, StartEvent, StepEvent, WarningEvent
from lumiere.training.interruption import Interruption
from lumiere.training.loss import Objective, compiled, summed_loss
from lumiere.training.nonfinite import Guard, is_finite
from lumiere.training.saving import Saver
from lumiere.training.schedule import learning_rate_factor, unfinished_warmup
from lumiere.training.shards import own_rows, whole
from lumiere.training.state import TrainingState, new_model


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
    listeners: Sequence[Listener] = (),
    checkpoint: Checkpoint | None = None,
    world: World = ALONE,
) -> TrainingResult:
    """Train until the last step, or until patience is exhausted, or until a signal.

    Args:
        corpus: the splits `train` and `validation` in ids.
        run: where checkpoints go.
        precision: type of the matrix products; the weights are float32.
        peak_flops: FLOP/s of the device in that type, of all processes' together, which `mfu` is a share of.
        listeners: called with each event, in order.
        checkpoint: the state to go on from (None: from the start). The result on a CPU is, bit for bit, that of a
            training which never stopped, on the same machine with the same number of threads and processes.
        world: the processes that train together, each of which calls this; rank 0 alone writes.

    Raises:
        NonFiniteError: if the loss, the gradients or the weights are no longer finite.
    """
    settings = config.training
    windows = corpus.windows("train", config)
    validation = corpus.windows("validation", config)
    epoch_steps = steps_per_epoch(windows, settings.batch_size)
    total_steps = num_steps(settings, epoch_steps)

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    objective: Objective = summed_loss
    if settings.compile:
        objective = compiled(lambda message: tell(WarningEvent(state.step, message)))
    model = new_model(config)
    objective = distributed(model, objective, settings.parallel, device, world)
    state = TrainingState.around(model, settings, precision)
    if checkpoint is not None:
        state.restore(own_rows(checkpoint, model, world))
        # Afresh, because the settings may allow more, or less, than those it was saved with.
        state.stop_reason = reason_to_stop(state, settings, total_steps)

    guard = Guard(run, state, settings, precision, windows, tell)
    saver = Saver(run, state, config, corpus, epoch_steps, tell, guard, world)

    names = (run.name, state.step, total_steps, epoch_steps, state.model.num_parameters, len(windows))
    tell(StartEvent(*names, str(device), str(precision).removeprefix("torch."), peak_flops))
    if message := unfinished_warmup(settings.warmup_steps, total_steps):
        tell(WarningEvent(state.step, message))
    if state.step == 0 and settings.snapshots:
        saver.snapshot()
    evaluation = None
    reported = (state.tokens, state.seconds)
    state.model.train()

    with Interruption() as interruption:
        while state.stop_reason is None:
            started = time.perf_counter()
            share = (world.rank, world.size)
            batch = batch_at(state.step, windows, settings.batch_size, settings.seed, *share).to(device)
            seed_dropout(settings.seed, state.step, world)
            plan = (total_steps, settings.warmup_steps, settings.schedule, settings.decay_fraction)
            factor = learning_rate_factor(state.step + 1, *plan)
            loss, grad_norm = train_step(state, batch, factor, settings, precision, objective, world)
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
                tell(StepEvent(*progress, loss, settings.learning_rate * factor, grad_norm, speed, mfu))
                reported = (state.tokens, state.seconds)

            evaluates = is_last or ends_epoch or is_due(settings.eval_interval, state.step)
            if evaluates:
                facts = corpus.splits["validation"].facts
                with state.averaged_model() as model, evaluating(objective):
                    evaluation = evaluate(model, validation, facts, settings.batch_size, world)
                guard.check_evaluation(evaluation.loss)
                is_best = state.note_evaluation(evaluation.loss)
                if ends_epoch:
                    state.note_epoch(evaluation.loss, settings.stopping_threshold)
                state.stop_reason = reason_to_stop(state, settings, total_steps)
                tell(EvaluationEvent(*progress, evaluation, is_best))
                if is_best:
                    saver.save("best", evaluation)
            if settings.snapshots:
                saver.snapshot()
            # By one decision: the others wait for a process that stops a step earlier.
            signal_number = world.largest(interruption.signal_number or 0)
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
    world: World = ALONE,
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
    parts = batch.split(settings.gradient_accumulation_steps, fills=world.size > 1)
    for number, part in enumerate(parts, start=1):
        with autocast, accumulating(objective, is_last=number == len(parts)):
            loss = objective(state.model, part.tokens, part.targets) / batch.num_targets
        loss.backward()
        if device == "cuda":
            # The GPU waits for the gradients of all ranks without a word; meet first, where a rank that hangs is named.
            world.wait()
        loss_sum += loss.detach()
    limit = settings.gradient_clip_norm or math.inf
    norm = whole(get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None]))
    # Read both at once: each read waits for the device.
    total, grad_norm = torch.stack([loss_sum, norm]).tolist()
    total = world.total(total)
    # In two halves, because clipping by a norm that is not finite would make every gradient NaN.
    if is_finite(total, grad_norm):
        if grad_norm > limit:
            clip_grads_with_norm_(state.model.parameters(), limit, norm)
        state.update(factor)
    return total, grad_norm


def is_due(interval: int | None, step: int) -> bool:
    """Whether something that happens every `interval` steps happens at `step`."""
    return interval is not None and step % interval == 0
