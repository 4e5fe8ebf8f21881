"""`lumiere train`."""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from lumiere.cli.console import (
    as_typed,
    duration,
    escape,
    print_json,
    scaled,
    short_time,
    show_note,
    show_warning,
    size,
    stderr,
    stdout,
)
from lumiere.cli.options import Json, OptionalConfig, Overrides, RunsDir, complete_run
from lumiere.cli.streams import is_unicode
from lumiere.errors import LumiereError, printable, refuse_both

if TYPE_CHECKING:
    from lumiere.config.schema import RunConfig
    from lumiere.distributed import ProcessGroup
    from lumiere.persistence.runs import Run, RunStore
    from lumiere.training.estimate import Plan
    from lumiere.training.parent import Parent
    from lumiere.training.setup import TrainingSetup
    from lumiere.training.trainer import TrainingResult

SAMPLE_TOKENS = 160
SAMPLE_TEMPERATURE = 0.7
STOP_REASONS = {
    "max_steps": "reached max_steps",
    "max_epochs": "reached max_epochs",
    "patience": "validation loss stopped improving",
}


def train(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    max_steps: Annotated[int | None, Option(metavar="N", help="Stop after N steps (training.max_steps).")] = None,
    device: Annotated[str | None, Option(help="Train on auto, cpu, cuda, cuda:1 or mps (training.device).")] = None,
    seed: Annotated[
        int | None, Option(metavar="N", help="Seed weights, dropout and data order (training.seed).")
    ] = None,
    resume: Annotated[
        str | None,
        Option(
            metavar="RUN",
            help="Continue a run from its latest checkpoint. On a CPU, the result is bit-identical to an uninterrupted "
            "run. Extend it with --set training.max_epochs=N; move it with --device.",
            autocompletion=complete_run,
        ),
    ] = None,
    start_from: Annotated[
        str | None,
        Option(
            "--from",
            metavar="RUN[@CHECKPOINT]",
            help="Start a new run from the weights of a run, with its model and tokenizer. CHECKPOINT is best (the "
            "default), latest, previous, or a step with a snapshot.",
            autocompletion=complete_run,
        ),
    ] = None,
    runs_dir: RunsDir = None,
    print_config: Annotated[bool, Option("--print-config", help="Print the resolved config and exit.")] = False,
    plan: Annotated[
        bool, Option("--plan", help="Estimate parameters, memory, disk and time from a five-second dry run, then exit.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a model and record the run.

    Ctrl-C finishes the step and saves a checkpoint; [bold]lumiere train --resume RUN[/] resumes there.

    Examples: [bold]lumiere train tiny[/], [bold]lumiere train small --set model.num_layers=6[/],
    [bold]lumiere train mine.yaml --from latest[/]
    """
    from lumiere.config.loader import dump_config, given_settings, parse_override, validate
    from lumiere.distributed import ProcessGroup, TorchrunGroup, joined
    from lumiere.persistence.runs import RunStore

    launched = ProcessGroup.from_environment()
    if launched.rank and (plan or print_config):
        return
    store = RunStore(runs_dir)
    flags = {"training.max_steps": max_steps, "training.device": device, "training.seed": seed}
    changes = [*(overrides or ()), *(f"{path}={value}" for path, value in flags.items() if value is not None)]

    def read_command() -> "tuple[RunConfig | None, Parent | None]":
        """Return the config, and the parent of a run to fine-tune; no config if a run is resumed, which has its own."""
        if plan and resume is not None:
            raise LumiereError("--plan and --resume exclude each other", f"lumiere runs show {resume} shows its config")
        refuse_both({"--plan": plan, "--print-config": print_config})
        refuse_both({"--resume": resume, "--from": start_from})
        if resume is not None:
            if config is not None or print_config:
                hint = f"use: lumiere train --resume {resume}"
                raise LumiereError("a resumed run keeps its own config", hint)
            return None, None
        if config is None:
            example = "lumiere train tiny, or --resume RUN to resume a run"
            if start_from is not None:
                example = f"lumiere train mine.yaml --from {start_from}, with the new data and training settings"
            raise LumiereError("no config given", f"for example {example}")
        check_readable_by_all(config, launched)
        given = given_settings(config, overrides or (), flags)
        if start_from is None:
            return validate(given), None
        from lumiere.training.parent import Parent

        parent = Parent.find(start_from, store)
        return parent.inherit(given), parent

    if plan or print_config:
        resolved, parent = read_command()
        assert resolved is not None
        if plan:
            print_plan(resolved, parent, store.runs_dir, as_json, launched)
        else:
            sys.stdout.write(printable(dump_config(resolved, allow_unicode=is_unicode()), keep="\n"))
        return

    with joined(f"{resume or config} {start_from or ''} {changes}") as processes:
        restarted = None
        if processes.job is not None:  # otherwise torch loads later, after the corpus has been found
            from lumiere.training.run import restarted_run

            restarted = restarted_run(store, processes)
        # A run that exists has its config, and needs nothing of its parent any more.
        resolved, parent = read_command() if restarted is None else (None, None)
        settings = {} if resume is None else dict(map(parse_override, changes))
        if processes.rank and isinstance(processes, TorchrunGroup):
            from lumiere.training.run import follow

            result, setup = follow(resolved, store, settings, processes, parent), None
        elif resolved is not None:
            result, setup = start_new(resolved, parent, store, processes)
        else:
            run = restarted or store.open(resume or "")
            result, setup = resume_run(run, settings, as_json, processes)
    if result is None:
        return
    if setup is not None:
        report(result, setup, as_json)
    if result.signal_number is not None:
        raise Exit(128 + result.signal_number)  # as a shell would


def check_readable_by_all(config: str, processes: "ProcessGroup") -> None:
    """Refuse standard input or a pipe as config of several processes: only one of them could read it."""
    is_special = os.path.exists(config) and not os.path.isfile(config) and not os.path.isdir(config)
    if processes.size > 1 and (config == "-" or is_special):
        raise LumiereError(
            f"the config {config!r} is not a file, and each of the {processes.size} processes reads it",
            "write it into a file",
        )


def start_new(
    config: "RunConfig", parent: "Parent | None", store: "RunStore", processes: "ProcessGroup"
) -> "tuple[TrainingResult, TrainingSetup]":
    """Train a new run in a single process or as rank 0.

    Args:
        parent: Whose weights it starts from. None: random weights.
    """
    from lumiere.cli.progress import CorpusProgress, TrainingProgress
    from lumiere.training.setup import set_up

    origin = parent.origin(show_note) if parent else None
    with CorpusProgress() as corpus_progress:
        setup = set_up(config, corpus_progress, origin)
    from lumiere.training.run import start

    with TrainingProgress() as progress:
        command = ["lumiere", *sys.argv[1:]]
        return start(setup, store, command=command, callbacks=[progress], processes=processes), setup


def resume_run(
    run: "Run", settings: Mapping[str, Any], as_json: bool, processes: "ProcessGroup"
) -> "tuple[TrainingResult, TrainingSetup] | tuple[None, None]":
    """Resume a run with other settings in a single process or as rank 0; None if it is finished."""
    from lumiere.cli.progress import CorpusProgress, TrainingProgress
    from lumiere.training.run import dismiss, resume, stop_reason
    from lumiere.training.setup import set_up_resume

    reason = stop_reason(run)
    # A run that was killed after its last step is not marked as finished yet: resuming completes it.
    if reason is not None and not settings and run.status == "finished":
        dismiss(processes)
        ended = f"{run.name} is finished ({STOP_REASONS.get(reason, 'as recorded')}): nothing to resume"
        show_note(f"{ended}; --from {run.id} starts a new run from its weights")
        if as_json:
            print_json({"run": run.name} | run.record.to_json())
        return None, None
    with CorpusProgress() as corpus_progress:
        setup = set_up_resume(run, corpus_progress, settings)
    for change in setup.changes:
        show_note(f"changed since the run started: {change}")
    with TrainingProgress() as progress:
        return resume(setup, run, callbacks=[progress], processes=processes), setup


def report(result: "TrainingResult", setup: "TrainingSetup", as_json: bool) -> None:
    """Print how training ended, a sample of the best checkpoint, and commands to try next."""
    from lumiere.generation.decoding import generate
    from lumiere.generation.sampling import Sampling

    run, state = result.run, result.state
    if result.signal_number is not None:
        command = escape(as_typed(run.command("train", "--resume", run.id)))
        stderr().print(f"interrupted at step {state.step:,} and saved; resume with {command}")
        return
    if as_json:
        print_json({"run": run.name} | run.record.to_json())
        return
    stdout().print(f"[bold]{run.name}[/] finished: {STOP_REASONS.get(state.stop_reason or '', 'as recorded')}")
    if state.best_loss is not None:
        stdout().print(f"  best validation loss {state.best_loss:.4f} at step {state.best_step:,}")
    speed = state.tokens / state.seconds if state.seconds else 0.0
    stdout().print(f"  {state.step:,} steps, {state.tokens:,} tokens, {speed:,.0f} tokens/s\n\nSample:\n")
    sampling = Sampling(temperature=SAMPLE_TEMPERATURE)
    sample = generate(run.load_model("best"), setup.corpus.tokenizer, None, SAMPLE_TOKENS, sampling, seed=0)
    stdout().print(escape("".join(sample).strip()), style="italic", soft_wrap=False)
    stdout().print("\nNext steps:")
    for command in (
        run.command("generate", "--run", run.id),
        run.command("inspect", "attention", "--layer", str(setup.config.model.num_layers - 1), "--run", run.id),
        run.command("eval", run.id, "--split", "test" if "test" in run.record.splits else "validation"),
    ):
        stdout().print(f"  {escape(as_typed(command))}", style="bold")


def print_plan(
    config: "RunConfig", parent: "Parent | None", runs_dir: Path, as_json: bool, processes: "ProcessGroup"
) -> None:
    """Estimate what training `config` takes from a dry run, without writing to `runs_dir`."""
    from lumiere.cli.progress import CorpusProgress
    from lumiere.distributed import share_cores
    from lumiere.training.setup import set_up

    if processes.size > 1:
        share_cores(processes)
    origin = parent.origin(show_note) if parent else None
    with CorpusProgress() as progress:
        setup = set_up(config, progress, origin)
    from lumiere.training.estimate import MEASURED_SECONDS, make_plan
    from lumiere.training.run import free_room

    show_note(f"measuring for {MEASURED_SECONDS:.0f} seconds; nothing is written")
    plan = make_plan(setup, show_warning, processes)
    _, free = free_room(runs_dir)
    if as_json:
        totals = {"num_parameters": plan.parameters.total, "disk_bytes": plan.disk.total, "disk_free_bytes": free}
        print_json(asdict(plan) | totals | {"total_seconds": plan.total_seconds})
        return
    for figure, value, *meaning in plan_rows(config, plan, free):
        style = "not bold" if figure.startswith(" ") else "bold"
        meant = f"  [dim]{meaning[0]}[/]" if meaning and meaning[0] else ""
        stdout().print(f"[{style}]{figure:17}[/]  {value:>15}{meant}")


def plan_rows(config: "RunConfig", plan: "Plan", free: int) -> Iterator[tuple[str, ...]]:
    """Yield each estimate: its name (indented: a part of the row above), its value, and what it means."""
    from lumiere.training.costs import NUM_CHECKPOINTS

    settings, parameters, memory, disk = config.training, plan.parameters, plan.memory, plan.disk
    is_shared, held = plan.num_processes > 1, memory.weights + memory.gradients + memory.optimizer + memory.activations

    yield "parameters", f"{parameters.total:,}"
    if plan.num_trained_parameters < parameters.total:
        yield "  trained", f"{plan.num_trained_parameters:,}", f"frozen: {', '.join(settings.freeze)}"
    remark = "" if parameters.output_head else "also the output head"
    yield "  token embedding", f"{parameters.token_embedding:,}", remark
    yield "  positions", f"{parameters.positions:,}", config.model.positions
    yield "  attention", f"{parameters.attention:,}"
    yield "  feed-forward", f"{parameters.feedforward:,}"
    yield "  norms", f"{parameters.norms:,}"
    if parameters.output_head:
        yield "  output head", f"{parameters.output_head:,}"
    yield "FLOPs per token", f"{scaled(plan.flops_per_token)}FLOP", "matrix products, forward and backward"
    if is_shared:
        weights = "its shard of the" if settings.parallel == "fsdp" else "all"
        each = f"{plan.windows_per_process} of {settings.batch_size} windows per step and {weights} weights each"
        yield "processes", f"{plan.num_processes}", each
    yield "memory", size(held), "plus temporary buffers"
    yield "  weights", size(memory.weights)
    yield "  gradients", size(memory.gradients)
    yield "  optimizer", size(memory.optimizer), settings.optimizer
    yield "  activations", size(memory.activations), "kept for the backward pass, measured"
    if memory.peak is not None:
        on_gpu = plan.device.startswith("cuda")
        yield "  peak", size(memory.peak), "all tensors, measured" if on_gpu else "the whole process, with torch"
    yield "disk", size(disk.total), f"at most; {size(free)} free"
    yield "  checkpoints", f"{NUM_CHECKPOINTS} x {size(disk.checkpoint)}", "best, latest, previous, one being written"
    yield "  snapshots", f"{disk.num_snapshots} x {size(disk.snapshot)}", "weights only"
    yield "speed", f"{plan.tokens_per_second:,.0f} tok/s", f"{plan.mfu:.0%} of the peak (MFU)"
    if is_shared:
        yield "  all processes", "", "extrapolated from one, without communication"
    yield "  per step", short_time(plan.seconds_per_step), f"median of {plan.measured_steps:,}"
    yield "  peak", f"{scaled(plan.peak_flops)}FLOP/s", f"{plan.precision} on {plan.device}, measured"
    yield "  padding", f"{plan.padding_share:.1%}", "of all positions; computed but not scored"
    epochs = f"{plan.total_steps / plan.epoch_steps:,.1f} epochs of {plan.epoch_steps:,}"
    yield "steps", f"{plan.total_steps:,}", epochs
    if plan.warmup_steps:
        is_cut = plan.warmup_steps > plan.total_steps
        yield "  warm-up", f"{plan.warmup_steps:,}", "longer than training" if is_cut else ""
    if plan.earliest_stop is not None:
        yield "  at least", f"{plan.earliest_stop:,}", f"if patience ({settings.patience}) stops it early"
    yield "time", duration(plan.total_seconds), "without saving"
    yield "  starting", short_time(plan.startup_seconds), "extra time of the first steps"
    yield "  steps", duration(plan.total_steps * plan.seconds_per_step)
    evaluations = f"{plan.num_evaluations:,} x {short_time(plan.seconds_per_evaluation)}"
    yield "  evaluations", duration(plan.num_evaluations * plan.seconds_per_evaluation), evaluations
