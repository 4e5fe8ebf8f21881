"""Estimate of a training run (`--plan`): computed from its config, and measured in a few seconds of real steps."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lumiere.data.batches import Windows, batch_at
from lumiere.distributed import SINGLE_PROCESS, ProcessGroup
from lumiere.evaluation.loss import evaluate
from lumiere.models.transformer import Transformer
from lumiere.training import costs
from lumiere.training.costs import Disk, Parameters
from lumiere.training.loss import Objective, compiled, summed_loss
from lumiere.training.schedule import earliest_stop, num_evaluations, unfinished_warmup
from lumiere.training.setup import TrainingSetup, check_shares
from lumiere.training.state import TrainingState
from lumiere.training.trainer import train_step

WARMUP_STEPS = 2
"""First steps, which are not counted: they allocate memory, and compile if configured."""
MIN_STEPS = 3
MEASURED_SECONDS = 5.0
EVALUATION_BATCHES = 8


@dataclass(frozen=True)
class Memory:
    """Bytes that a step holds at once, by purpose.

    Attributes:
        weights: Float32 in any precision. With `parallel: fsdp`, this and the next two are the share of a process,
            without the weights of a block and of the embedding that are gathered temporarily.
        gradients: One per trained weight.
        optimizer: Its averages.
        activations: Measured size of what the forward pass of one accumulation step keeps for the backward pass,
            without the temporary memory of single operations.
        peak: Maximum in use during the measurement: on a CUDA device by tensors, elsewhere by the whole process since
            it started, including Python, torch and reading the corpus (None: the system does not report it). The
            measuring process has all weights.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int | None


@dataclass(frozen=True)
class Plan:
    """What a training run takes. Times exclude saving and reading the corpus, like those of `metrics.jsonl`.

    Attributes:
        flops_per_token: Of a trained position, forward and backward.
        padding_share: Fraction of the positions of all training windows that are padding.
        epoch_steps: Steps per epoch.
        total_steps: Steps, unless patience ends training earlier.
        earliest_stop: First step at which patience could end it. None: it cannot.
        warmup_steps: Steps in which the learning rate rises.
        num_evaluations: In `total_steps`.
        num_processes: Processes that share each step's windows and each evaluation's batches. Memory is that of each.
            Times are those of one process alone with its share, without the exchange of gradients.
        windows_per_process: Of a full batch.
        peak_flops: Measured FLOP/s of the device in matrix products, times `num_processes`.
        measured_steps: Number of steps behind the following values.
        seconds_per_step: Their median.
        tokens_per_second: Their mean number of targets, without padding, divided by that median.
        mfu: Fraction of `peak_flops` that those tokens take.
        startup_seconds: Extra time of the first steps, which are not counted above.
        seconds_per_evaluation: Extrapolated from the first batches of the validation windows.
    """

    parameters: Parameters
    num_trained_parameters: int
    flops_per_token: int
    memory: Memory
    disk: Disk
    num_windows: int
    padding_share: float
    epoch_steps: int
    total_steps: int
    earliest_stop: int | None
    warmup_steps: int
    num_evaluations: int
    num_processes: int
    windows_per_process: int
    device: str
    precision: str
    peak_flops: float
    measured_steps: int
    seconds_per_step: float
    tokens_per_second: float
    mfu: float
    startup_seconds: float
    seconds_per_evaluation: float

    @property
    def total_seconds(self) -> float:
        """Time of all steps and evaluations."""
        evaluating = self.num_evaluations * self.seconds_per_evaluation
        return self.startup_seconds + self.total_steps * self.seconds_per_step + evaluating


def make_plan(setup: TrainingSetup, warn: Callable[[str], None], processes: ProcessGroup = SINGLE_PROCESS) -> Plan:
    """Measure some steps and a part of an evaluation on the corpus. Nothing is written.

    Args:
        warn: Called if something does not work as configured, such as compiling.
        processes: The processes that would train. Only this one measures.

    Raises:
        LumiereError: They cannot share the batches or the device.
    """
    config, epoch_steps = setup.config, setup.epoch_steps
    settings = config.training
    check_shares(settings, setup.device, processes)
    total_steps = setup.total_steps
    if setup.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setup.device)
    objective = compiled(warn) if settings.compile else summed_loss
    state = TrainingState.create(config, setup.device, setup.precision)
    state.model.train()
    seconds, targets = measure_steps(setup, state, objective, processes.size)
    seconds_per_step = statistics.median(seconds[WARMUP_STEPS:])
    tokens_per_second = statistics.mean(targets[WARMUP_STEPS:]) / seconds_per_step
    flops_per_token = costs.flops_per_token(config)
    seconds_per_evaluation = measure_evaluation(setup, state.model) / processes.size
    num_shares = processes.size if settings.parallel == "fsdp" else 1
    memory = Memory(
        weights=costs.weight_bytes(config) // num_shares,
        gradients=costs.gradient_bytes(config) // num_shares,
        optimizer=costs.optimizer_bytes(config) // num_shares,
        activations=measure_activations(setup, state.model, objective, processes.size),
        peak=peak_memory(setup.device),
    )
    windows = setup.corpus.windows("train", config)
    if message := unfinished_warmup(settings.warmup_steps, total_steps):
        warn(message)
    return Plan(
        parameters=costs.count_parameters(config),
        num_trained_parameters=setup.num_trained_parameters,
        flops_per_token=flops_per_token,
        memory=memory,
        disk=costs.disk(config, total_steps, is_fine_tuned=bool(setup.lineage)),
        num_windows=len(windows),
        padding_share=windows.padding_share,
        epoch_steps=epoch_steps,
        total_steps=total_steps,
        earliest_stop=earliest_stop(settings, epoch_steps),
        warmup_steps=settings.warmup_steps,
        num_evaluations=num_evaluations(settings, epoch_steps),
        num_processes=processes.size,
        windows_per_process=settings.batch_size // processes.size,
        **setup.resolved,
        peak_flops=setup.peak_flops * processes.size,
        measured_steps=len(seconds) - WARMUP_STEPS,
        seconds_per_step=seconds_per_step,
        tokens_per_second=tokens_per_second,
        mfu=tokens_per_second * flops_per_token / (setup.peak_flops * processes.size),
        startup_seconds=max(0.0, sum(seconds[:WARMUP_STEPS]) - WARMUP_STEPS * seconds_per_step),
        seconds_per_evaluation=seconds_per_evaluation,
    )


def measure_steps(
    setup: TrainingSetup, state: TrainingState, objective: Objective, num_shares: int = 1
) -> tuple[list[float], list[int]]:
    """Return seconds and numbers of targets of the first steps, for `MEASURED_SECONDS` after the warm-up."""
    config, settings = setup.config, setup.config.training
    windows = setup.corpus.windows("train", config)
    seconds: list[float] = []
    targets: list[int] = []
    while len(seconds) < WARMUP_STEPS + MIN_STEPS or sum(seconds[WARMUP_STEPS:]) < MEASURED_SECONDS:
        started = time.perf_counter()
        share = batch_at(len(seconds), windows, settings.batch_size, settings.seed, 0, num_shares)
        batch = share.to(setup.device)
        # A learning rate of zero takes as long as any other and keeps the weights.
        train_step(state, batch, 0.0, settings, setup.precision, objective)
        seconds.append(time.perf_counter() - started)
        targets.append(batch.num_targets)
    return seconds, targets


def measure_evaluation(setup: TrainingSetup, model: Transformer) -> float:
    """Return the seconds of an evaluation, extrapolated from the first validation windows."""
    config, batch_size = setup.config, setup.config.training.batch_size
    split = setup.corpus.splits["validation"]
    windows = setup.corpus.windows("validation", config)
    # The first tokens of the split, as a split of their own.
    end = min(EVALUATION_BATCHES * batch_size * windows.stride, int(windows.offsets[-1]))
    offsets = np.append(windows.offsets[: np.searchsorted(windows.offsets, end)], end)
    if windows.only_last:
        last = np.array([min(EVALUATION_BATCHES * batch_size, len(windows)) - 1])
        offsets = windows.offsets[: windows.documents(last)[0] + 2]
    beginning = Windows(
        windows.ids, offsets, windows.context_size, windows.sliding_window_size, only_last=windows.only_last
    )
    evaluation = evaluate(model, beginning, split.facts, batch_size)
    return evaluation.seconds / evaluation.num_windows * len(windows)


def measure_activations(setup: TrainingSetup, model: Transformer, objective: Objective, num_shares: int = 1) -> int:
    """Return the bytes that autograd keeps for the backward pass of a batch's first part, without the weights."""
    config, settings = setup.config, setup.config.training
    windows = setup.corpus.windows("train", config)
    batch = batch_at(0, windows, settings.batch_size, settings.seed, 0, num_shares)
    part = batch.to(setup.device).split(settings.gradient_accumulation_steps)[0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()  # once, however many operations keep it
        return tensor

    bfloat16 = setup.precision == torch.bfloat16
    with (
        torch.autocast(setup.device.type, torch.bfloat16, enabled=bfloat16),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        loss = objective(model, part.tokens, part.targets)
    total = sum(kept.values())
    del loss  # only now: what it keeps has an address of its own as long as it lives
    return total


def peak_memory(device: torch.device) -> int | None:
    """Return the maximum number of bytes in use, as in `Memory.peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
