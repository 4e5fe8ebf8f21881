"""`lumiere train`."""

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lumiere.cli.console import (
    INTERRUPTED,
    as_typed,
    escape,
    print_json,
    scaled,
    short_time,
    show_note,
    size,
    stderr,
    stdout,
)
from lumiere.cli.options import Json, OptionalConfig, Overrides, RunsDir, complete_run
from lumiere.cli.streams import is_unicode
from lumiere.errors import LumiereError, printable

if TYPE_CHECKING:
    from lumiere.config.schema import RunConfig
    from lumiere.distributed import ProcessGroup
    from lumiere.persistence.runs import Run, RunStore
    from lumiere.training.estimate import Plan
    from lumiere.training.trainer import TrainingResult


TERMINATED = 143
SAMPLE_TOKENS = 160
SAMPLE_TEMPERATURE = 0.7


def train(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", metavar="N", help="Stop after N steps (training.max_steps).")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Train on auto, cpu, cuda, cuda:1 or mps (training.device)."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Seed weights, dropout and data order (training.seed).")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="Continue a run from its latest checkpoint. On a CPU, the result is bit-identical to an uninterrupted "
            "run. Extend it with --set training.max_epochs=N; move it with --device.",
            autocompletion=complete_run,
        ),
    ] = None,
    runs_dir: RunsDir = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved config and exit.")] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Estimate parameters, memory, disk and time from a five-second dry run, then exit."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a model and record the run.

    Ctrl-C finishes the step and saves a checkpoint; [bold]lumiere train --resume RUN[/] resumes there.

    Examples: [bold]lumiere train tiny[/], [bold]lumiere train configs/small.yaml --set model.num_layers=6[/]
    """
    from lumiere.config.loader import dump_config, load_config
    from lumiere.distributed import ProcessGroup, TorchrunGroup, joined
    from lumiere.persistence.runs import RunStore

    launched = ProcessGroup.from_environment()
    if launched.rank and (plan or print_config):
        return
    store = RunStore(runs_dir)
    flags = {"training.max_steps": max_steps, "training.device": device, "training.seed": seed}
    changes = [*(overrides or ()), *(f"{path}={value}" for path, value in flags.items() if value is not None)]

    def read_config() -> "RunConfig | None":
        """Return the config of the command line; None if a run is resumed, which has its own."""
        if resume is not None:
            if config or print_config:
                hint = f"use: lumiere train --resume {resume}"
                raise LumiereError("a resumed run keeps its own config", hint)
            return None
        if config is None:
            raise LumiereError("no config given", "for example lumiere train tiny, or --resume RUN to resume a run")
        check_readable_by_all(config, launched)
        return load_config(config, overrides or (), flags)

    if plan:
        if resume is not None:
            raise LumiereError("--plan and --resume exclude each other", f"lumiere runs show {resume} shows its config")
        if print_config:
            raise LumiereError("--plan and --print-config exclude each other", "use one of them")
    if plan or print_config:
        resolved = read_config()
        assert resolved is not None
        if plan:
            print_plan(resolved, store.runs_dir, as_json)
        else:
            sys.stdout.write(printable(dump_config(resolved, allow_unicode=is_unicode()), keep="\n"))
        return

    with joined(f"{resume or config} {changes}") as processes:
        resolved = read_config()
        if processes.rank and isinstance(processes, TorchrunGroup):
            from lumiere.training.run import follow

            result = follow(resolved, store, changes, processes)
        else:
            result = start_or_resume(resolved, resume, changes, store, as_json, processes)
    if result and not processes.rank:
        finish(result, as_json)
    elif result and result.signal_number is not None:
        raise typer.Exit(exit_code(result.signal_number))


def check_readable_by_all(config: str, processes: "ProcessGroup") -> None:
    """Refuse a config that only one of several processes could read.

    Raises:
        LumiereError: It is a pipe or standard input.
    """
    if processes.size > 1 and (
        config == "-" or (os.path.exists(config) and not os.path.isfile(config) and not os.path.isdir(config))
    ):
        raise LumiereError(
            f"the config {config!r} is no file, and each of the {processes.size} processes reads it for itself",
            "write it into a file",
        )


def start_or_resume(
    config: "RunConfig | None",
    resume: str | None,
    changes: list[str],
    store: "RunStore",
    as_json: bool,
    processes: "ProcessGroup",
) -> "TrainingResult | None":
    """Train in a single process or as rank 0; after a restart by torchrun, resume the run of the start before."""
    run = None
    if processes.job is not None:  # otherwise torch loads later, after the corpus has been found
        from lumiere.training.run import restarted_run

        run = restarted_run(store, processes)
    if config is not None and run is None:
        return start_training(config, store, processes)
    return resume_training(run or store.open(resume or ""), [] if config else changes, as_json, processes)


def start_training(config: "RunConfig", store: "RunStore", processes: "ProcessGroup") -> "TrainingResult":
    """Train a new run."""
    from lumiere.cli.progress import CorpusProgress, TrainingProgress
    from lumiere.training.setup import set_up

    with CorpusProgress() as corpus_progress:
        setup = set_up(config, corpus_progress)
    from lumiere.training.run import start

    with TrainingProgress() as progress:
        return start(setup, store, command=["lumiere", *sys.argv[1:]], callbacks=[progress], processes=processes)


def resume_training(
    run: "Run", overrides: list[str], as_json: bool, processes: "ProcessGroup"
) -> "TrainingResult | None":
    """Resume `run`; return None if it is finished already."""
    from lumiere.cli.progress import CorpusProgress, TrainingProgress
    from lumiere.training.run import dismiss, resume, stop_reason
    from lumiere.training.setup import set_up_resume

    reason = stop_reason(run)
    # A run that was killed after its last step is not marked as finished yet: resuming completes it.
    if reason is not None and not overrides and run.status == "finished":
        dismiss(processes)
        show_note(f"{run.name} is finished ({explain(reason)}): nothing to resume")
        if as_json:
            print_json({"run": run.name} | run.record.to_json())
        return None
    with CorpusProgress() as corpus_progress:
        setup = set_up_resume(run, corpus_progress, overrides)
    for change in setup.changes:
        show_note(f"changed since the run started: {change}")
    with TrainingProgress() as progress:
        return resume(setup, run, callbacks=[progress], processes=processes)


def finish(result: "TrainingResult", as_json: bool) -> None:
    """Print how training ended; after a signal, exit with its code."""
    run, state = result.run, result.state
    if result.signal_number is not None:
        command = escape(as_typed(run.command("train", "--resume", run.id)))
        stderr().print(f"interrupted at step {state.step:,} and saved; resume with {command}")
        raise typer.Exit(exit_code(result.signal_number))
    if as_json:
        print_json({"run": run.name} | run.record.to_json())
        return
    stdout().print(f"[bold]{run.name}[/] finished: {explain(state.stop_reason or '')}")
    if state.best_loss is not None:
        stdout().print(f"  best validation loss {state.best_loss:.4f} at step {state.best_step:,}")
    speed = state.tokens / state.seconds if state.seconds else 0.0
    stdout().print(f"  {state.step:,} steps, {state.tokens:,} tokens, {speed:,.0f} tokens/s")
    print_sample(run)
    stdout().print("\nNext steps:")
    for command in next_commands(run):
        stdout().print(f"  {escape(as_typed(command))}", style="bold")


def next_commands(run: "Run") -> list[str]:
    """Return commands to try on a trained model."""
    last_layer = run.load_config().model.num_layers - 1
    split = "test" if "test" in run.record.splits else "validation"
    return [
        run.command("generate", "--run", run.id),
        run.command("inspect", "attention", "--layer", str(last_layer), "--run", run.id),
        run.command("eval", run.id, "--split", split),
    ]


def exit_code(signal_number: int) -> int:
    """Return the exit code that a shell expects after a signal."""
    return TERMINATED if signal_number == signal.SIGTERM else INTERRUPTED


def print_sample(run: "Run") -> None:
    """Print a text that the best checkpoint generates."""
    from lumiere.generation.decoding import generate
    from lumiere.generation.sampling import Sampling

    pieces = generate(
        run.load_model(),
        run.load_tokenizer(),
        max_new_tokens=SAMPLE_TOKENS,
        sampling=Sampling(temperature=SAMPLE_TEMPERATURE),
        seed=0,
    )
    stdout().print("\nSample:\n")
    stdout().print(escape("".join(pieces).strip()), style="italic", soft_wrap=False)


def explain(reason: str) -> str:
    """Describe a stop reason."""
    return {
        "max_steps": "reached max_steps",
        "max_epochs": "reached max_epochs",
        "patience": "validation loss stopped improving",
    }.get(reason, "as recorded")


def print_plan(config: "RunConfig", runs_dir: Path, as_json: bool) -> None:
    """Estimate what training `config` takes from a dry run, without writing to `runs_dir`."""
    from lumiere.cli.progress import CorpusProgress, show_warning
    from lumiere.distributed import ProcessGroup, share_cores
    from lumiere.training.setup import set_up

    processes = ProcessGroup.from_environment()
    if processes.size > 1:
        share_cores(processes)
    with CorpusProgress() as progress:
        setup = set_up(config, progress)
    from lumiere.training.estimate import MEASURED_SECONDS, make_plan
    from lumiere.training.run import free_room

    show_note(f"measuring for {MEASURED_SECONDS:.0f} seconds; nothing is written")
    plan = make_plan(setup, show_warning, processes)
    _, free = free_room(runs_dir)
    if as_json:
        totals = {"num_parameters": plan.parameters.total, "disk_bytes": plan.disk.total, "disk_free_bytes": free}
        print_json(asdict(plan) | totals | {"total_seconds": plan.total_seconds})
    else:
        show_plan(config, plan, free)


def show_plan(config: "RunConfig", plan: "Plan", free: int) -> None:
    """Print each estimate, and what it means or where it comes from."""
    from lumiere.cli.progress import duration
    from lumiere.training.costs import NUM_CHECKPOINTS

    settings, parameters, memory, disk = config.training, plan.parameters, plan.memory, plan.disk
    held = memory.weights + memory.gradients + memory.optimizer + memory.activations
    evaluating = plan.num_evaluations * plan.seconds_per_evaluation

    row("parameters", f"{parameters.total:,}")
    row("  token embedding", f"{parameters.token_embedding:,}", "also the output head")
    row("  positions", f"{parameters.positions:,}", config.model.positions)
    row("  attention", f"{parameters.attention:,}")
    row("  feed-forward", f"{parameters.feedforward:,}")
    row("  norms", f"{parameters.norms:,}")
    row("FLOPs per token", f"{scaled(plan.flops_per_token)}FLOP", "matrix products, forward and backward")

    if plan.num_processes > 1:
        weights = "its shard of the" if settings.parallel == "fsdp" else "all"
        each = f"{plan.windows_per_process} of {settings.batch_size} windows per step and {weights} weights each"
        row("processes", f"{plan.num_processes}", each)
    row("memory", size(held), "plus temporary buffers")
    row("  weights", size(memory.weights))
    row("  gradients", size(memory.gradients))
    row("  optimizer", size(memory.optimizer), settings.optimizer)
    row("  activations", size(memory.activations), "kept for the backward pass, measured")
    if memory.peak is not None:
        on_gpu = plan.device.startswith("cuda")
        row("  peak", size(memory.peak), "all tensors, measured" if on_gpu else "the whole process, with torch")

    row("disk", size(disk.total), f"at most; {size(free)} free")
    row("  checkpoints", f"{NUM_CHECKPOINTS} x {size(disk.checkpoint)}", "best, latest, previous, one being written")
    row("  snapshots", f"{disk.num_snapshots} x {size(disk.snapshot)}", "weights only")

    row("speed", f"{plan.tokens_per_second:,.0f} tok/s", f"{plan.mfu:.0%} of the peak (MFU)")
    if plan.num_processes > 1:
        row("  all processes", "", "extrapolated from one, without communication")
    row("  per step", short_time(plan.seconds_per_step), f"median of {plan.measured_steps:,}")
    row("  peak", f"{scaled(plan.peak_flops)}FLOP/s", f"{plan.precision} on {plan.device}, measured")

    row("  padding", f"{plan.padding_share:.1%}", "of all positions; computed but not scored")

    row("steps", f"{plan.total_steps:,}", f"{plan.total_steps / plan.epoch_steps:,.1f} epochs of {plan.epoch_steps:,}")
    if plan.warmup_steps:
        is_cut = plan.warmup_steps > plan.total_steps
        row("  warm-up", f"{plan.warmup_steps:,}", "longer than training" if is_cut else "")
    if plan.earliest_stop is not None:
        row("  at least", f"{plan.earliest_stop:,}", f"if patience ({settings.patience}) stops it early")
    row("time", duration(plan.total_seconds), "without saving")
    row("  starting", short_time(plan.startup_seconds), "extra time of the first steps")
    row("  steps", duration(plan.total_steps * plan.seconds_per_step))
    row("  evaluations", duration(evaluating), f"{plan.num_evaluations:,} x {short_time(plan.seconds_per_evaluation)}")


def row(figure: str, value: str, meaning: str = "") -> None:
    """Print one row; indented rows are parts of the row above."""
    style = "not bold" if figure.startswith(" ") else "bold"
    stdout().print(f"[{style}]{figure:17}[/]  {value:>15}" + (f"  [dim]{meaning}[/]" if meaning else ""))
