"""Short training runs: one layer and one story, in epochs of five steps, the last of them with fewer windows."""

import hashlib
import json
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.numpy import load_file

from lumiere.config.loader import changed_config, parse_override
from lumiere.config.schema import RunConfig
from lumiere.data.batches import Batch, Windows
from lumiere.data.dataset import tokenize_corpus
from lumiere.distributed import SINGLE_PROCESS, ProcessGroup
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run, RunStore
from lumiere.training import run as run_module
from lumiere.training.events import Callback, EvaluationEvent, Event, StepEvent, WarningEvent
from lumiere.training.loss import summed_loss
from lumiere.training.setup import set_up, set_up_resume
from lumiere.training.state import TrainingState
from lumiere.training.trainer import TrainingResult, train_step
from tests.checkpoints import folder_of
from tests.conftest import TINY

CPU = torch.device("cpu")
EPOCH_STEPS = 5
BATCH_SIZE = 12
PEAK_FLOPS = 2e11
"""What the device is said to reach."""
SHORT = {
    "model.num_layers": 1,
    "dataset.num_documents": 1,
    "dataset.seed": 1,  # a story whose last window is padded
    "training.batch_size": BATCH_SIZE,
    "training.max_steps": 6,
    "training.eval_interval": None,
    "training.log_interval": 1,
    "training.snapshots": False,
}
Kind = TypeVar("Kind", bound=Event)


def short(changes: Mapping[str, Any] | None = None, /, **training: Any) -> RunConfig:
    """A config that trains in a twentieth of a second, with changes by dotted path, or by name in `training`."""
    by_path = {f"training.{name}": value for name, value in training.items()}
    return changed_config(TINY, (SHORT | dict(changes or {}) | by_path).items())


@dataclass(frozen=True)
class Trained:
    """A training run and its events."""

    result: TrainingResult
    events: Sequence[Event]

    @property
    def run(self) -> Run:
        return self.result.run

    @property
    def state(self) -> TrainingState:
        return self.result.state

    @property
    def end(self) -> tuple[int, str | None]:
        """The last step, and why it was the last."""
        return self.state.step, self.state.stop_reason

    @property
    def steps(self) -> list[StepEvent]:
        return of_kind(StepEvent, self.events)

    @property
    def evaluations(self) -> list[EvaluationEvent]:
        return of_kind(EvaluationEvent, self.events)

    @property
    def warnings(self) -> list[str]:
        return [event.message for event in of_kind(WarningEvent, self.events)]

    @property
    def weights(self) -> torch.Tensor:
        """All weights in one vector."""
        return flat_weights(self.state)


def train(
    config: RunConfig, *callbacks: Callback, runs_dir: str = "runs", processes: ProcessGroup = SINGLE_PROCESS
) -> Trained:
    """Train a new run."""
    events: list[Event] = []
    store, callbacks = RunStore(runs_dir), (events.append, *callbacks)
    return Trained(run_module.start(set_up(config), store, callbacks=callbacks, processes=processes), events)


def resume(
    run: Run, *callbacks: Callback, overrides: Sequence[str] = (), processes: ProcessGroup = SINGLE_PROCESS
) -> Trained:
    events: list[Event] = []
    setup = set_up_resume(run, settings=dict(map(parse_override, overrides)))
    return Trained(run_module.resume(setup, run, [events.append, *callbacks], processes), events)


def of_kind(kind: type[Kind], events: Iterable[Event]) -> list[Kind]:
    return [event for event in events if isinstance(event, kind)]


def at_step(step: int, act: Callable[[], object]) -> Callback:
    """A callback that does something during a step."""

    def call(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == step:
            act()

    return call


def stop_at(step: int) -> Callback:
    """A callback that is Ctrl-C during a step."""
    return at_step(step, lambda: signal.raise_signal(signal.SIGINT))


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def only_run() -> Run:
    (run,) = RunStore().all()
    return run


def saved_step(run: Run, name: str = "latest") -> int:
    return CheckpointManager(run.path.parent).load(run, name, groups=()).step


def names(run: Run) -> list[str]:
    """The names of a run's checkpoints."""
    return CheckpointManager(run.path.parent).names(run)


def files_of(run: Run, name: str = "latest") -> list[Path]:
    """The files with the tensors of a checkpoint."""
    return sorted(folder_of(run, name).glob("*.safetensors"))


def damage(run: Run, name: str = "latest") -> None:
    """Cut off the last byte of a checkpoint."""
    for file in files_of(run, name):
        file.write_bytes(file.read_bytes()[:-1])


def hashes(run: Run, name: str = "latest") -> dict[str, str]:
    """The SHA-256 of every tensor in a checkpoint, read without any code of ours."""
    # In a folder that one process has written, each file has whole tensors.
    manifest = json.loads((folder_of(run, name) / "checkpoint.json").read_text())
    prefixes = {file["name"]: file["prefix"] for file in manifest["files"]}
    tensors = {
        prefixes[file.name] + key: tensor for file in files_of(run, name) for key, tensor in load_file(file).items()
    }
    return {
        key: hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode() + tensor.tobytes()).hexdigest()
        for key, tensor in sorted(tensors.items())
    }


def windows_of(config: RunConfig, split: str = "train") -> Windows:
    return tokenize_corpus(config).windows(split, config)


def take_step(state: TrainingState, batch: Batch, config: RunConfig, factor: float = 1.0) -> tuple[float, float]:
    """Update a state once in float32; return the loss and the norm of the gradients."""
    return train_step(state, batch, factor, config.training, torch.float32, summed_loss)


def flat_weights(state: TrainingState) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])


def bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}
