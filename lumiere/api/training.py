"""`lumiere.train` and `run.resume`: train a model from Python.

Neither changes how threads wait, as the command does (`lumiere.cli.sleep_while_waiting`): OpenMP reads that once, when
torch is imported, and a script may have imported it before; the process and its variables are the caller's.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.api.runs import OpenedRun
from lumiere.persistence.runs import RunStore

if TYPE_CHECKING:
    from lumiere.config.schema import RunConfig
    from lumiere.data.dataset import Progress
    from lumiere.training.events import Event
    from lumiere.training.setup import TrainingSetup
    from lumiere.training.trainer import TrainingResult


def train(
    config: "str | Path | Mapping[str, Any] | RunConfig",
    settings: Mapping[str, Any] | None = None,
    *,
    start_from: str | None = None,
    runs_dir: str | Path | None = None,
    callbacks: "Sequence[Callable[[Event], None]]" = (),
    corpus_progress: "Callable[[Progress], None] | None" = None,
    **training: Any,
) -> OpenedRun:
    """Train a model, record the run, and open it.

    Ctrl-C, or a notebook's stop button, finishes the step, saves a checkpoint and raises `KeyboardInterrupt`;
    `run.resume()` and `lumiere train --resume RUN` resume there.

    Args:
        config: A YAML or TOML file, a preset such as `tiny`, a mapping of sections, or the config of a run.
        settings: Other settings by dotted path, such as `{"model.num_layers": 6}`.
        start_from: `RUN` or `RUN@CHECKPOINT` in the same runs directory, to fine-tune its weights.
        runs_dir: Default: `LUMIERE_RUNS_DIR`, or `runs` in the current folder.
        callbacks: Called with each event of `lumiere.training.events`; nothing is printed.
        corpus_progress: Called while the corpus is tokenized.
        training: Settings of the section `training`, such as `max_steps=100`; they win over `settings`.

    Raises:
        LumiereError: A setting is unknown or invalid, the corpus or the device is missing, or the disk is full.
    """
    from lumiere.config.loader import validate
    from lumiere.training.parent import Parent
    from lumiere.training.run import start
    from lumiere.training.setup import set_up

    changes = {**(settings or {}), **{f"training.{name}": value for name, value in training.items()}}
    given, store = given_values(config, changes), RunStore(runs_dir)
    parent = None if start_from is None else Parent.find(start_from, store)
    if parent is None:
        setup = set_up(validate(given), corpus_progress)
    else:
        setup = set_up(parent.inherit(given), corpus_progress, parent.origin())
    named = [str(config)] if isinstance(config, str | Path) else []
    command = ["lumiere.train", *named, *(f"{path}={value}" for path, value in changes.items())]
    command += [] if start_from is None else [f"start_from={start_from}"]
    return opened(start(setup, store, command, callbacks), setup)


def resume(
    run: OpenedRun,
    settings: Mapping[str, Any] | None = None,
    *,
    callbacks: "Sequence[Callable[[Event], None]]" = (),
    corpus_progress: "Callable[[Progress], None] | None" = None,
    **training: Any,
) -> OpenedRun:
    """Continue a run; see `OpenedRun.resume`."""
    from lumiere.training.run import resume, stop_reason
    from lumiere.training.setup import set_up_resume

    changes = {**(settings or {}), **{f"training.{name}": value for name, value in training.items()}}
    if not changes and run.run.status == "finished" and stop_reason(run.run) is not None:
        return run.at("latest")
    setup = set_up_resume(run.run, corpus_progress, changes)
    return opened(resume(setup, run.run, callbacks), setup)


def opened(result: "TrainingResult", setup: "TrainingSetup") -> OpenedRun:
    """Open a run after training.

    Raises:
        KeyboardInterrupt: A signal ended it.
    """
    if result.signal_number is not None:
        how = result.run.command("train", "--resume", result.run.id)
        raise KeyboardInterrupt(f"interrupted at step {result.state.step:,} and saved; resume with {how}")
    return OpenedRun(result.run, device=str(setup.device))


def given_values(config: "str | Path | Mapping[str, Any] | RunConfig", changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the caller gave, as nested mappings, with changes by dotted path."""
    from lumiere.config.loader import find_config, read_config, replaced
    from lumiere.config.schema import RunConfig

    if isinstance(config, RunConfig):
        values: Mapping[str, Any] = config.model_dump()
    else:
        values = config if isinstance(config, Mapping) else read_config(find_config(config))
    return replaced(values, changes.items())
