"""What `lumiere train --plan` prints."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lumiere.cli.console import print_json, show_note, stdout
from lumiere.errors import LumiereError

if TYPE_CHECKING:
    from lumiere.config.schema import RunConfig
    from lumiere.training.plan import Plan


def check_plan_is_alone(resume: str | None, print_config: bool) -> None:
    """Refuse what does not go with `--plan`.

    Raises:
        LumiereError: if there is a run to resume, or the config is to be printed.
    """
    if resume is not None:
        raise LumiereError(
            "--plan is about a training that has not begun, --resume about one that has",
            f"lumiere runs show {resume} shows the config that the run would go on with",
        )
    if print_config:
        raise LumiereError("--plan and --print-config both answer instead of training", "give one of them at a time")


def print_plan(config: "RunConfig", runs_dir: Path, as_json: bool) -> None:
    """Measure and print what a training of `config` takes; nothing is made in `runs_dir`."""
    from lumiere.cli.progress import CorpusProgress, show_warning
    from lumiere.components.world import World
    from lumiere.training.preparation import prepare
    from lumiere.training.processes import share_cores

    world = World.of_environment()
    if world.size > 1:
        share_cores(world)
    with CorpusProgress() as progress:
        preparation = prepare(config, progress)
    from lumiere.training.launch import free_room
    from lumiere.training.plan import MEASURED_SECONDS, make_plan

    show_note(f"measuring for {MEASURED_SECONDS:.0f} seconds, nothing is written")
    plan = make_plan(preparation, show_warning, world)
    _, free = free_room(runs_dir)
    if as_json:
        totals = {"num_parameters": plan.parameters.total, "disk_bytes": plan.disk.total, "disk_free_bytes": free}
        print_json(asdict(plan) | totals | {"total_seconds": plan.total_seconds})
    else:
        show(config, plan, free)


def show(config: "RunConfig", plan: "Plan", free: int) -> None:
    """Each figure, and what it means or where it comes from."""
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
    row("FLOPs a token", f"{scaled(plan.flops_per_token)}FLOP", "matrix products, forward and backward")

    if plan.num_processes > 1:
        weights = "its share of the" if settings.parallel == "fsdp" else "all"
        each = f"each has {plan.windows_per_process} of a step's {settings.batch_size} windows, and {weights} weights"
        row("processes", f"{plan.num_processes}", each)
    row("memory", size(held), "and what single operations need for a moment")
    row("  weights", size(memory.weights))
    row("  gradients", size(memory.gradients))
    row("  optimizer", size(memory.optimizer), settings.optimizer)
    row("  activations", size(memory.activations), "kept for the backward pass, measured")
    if memory.peak is not None:
        on_gpu = plan.device.startswith("cuda")
        row("  peak", size(memory.peak), "all tensors, measured" if on_gpu else "this whole process, torch included")

    row("disk", size(disk.total), f"at most; {size(free)} are free")
    row("  checkpoints", f"{NUM_CHECKPOINTS} x {size(disk.checkpoint)}", "best, latest, previous, one being written")
    row("  snapshots", f"{disk.num_snapshots} x {size(disk.snapshot)}", "the weights of some steps")

    row("speed", f"{plan.tokens_per_second:,.0f} tok/s", f"{plan.mfu:.0%} mfu: of the peak below")
    if plan.num_processes > 1:
        row("  of all", "", "as one does its share alone; the exchange of gradients left out")
    row("  a step", short_time(plan.seconds_per_step), f"median of {plan.measured_steps:,}")
    row("  peak", f"{scaled(plan.peak_flops)}FLOP/s", f"{plan.precision} on {plan.device}, measured")

    row("  padding", f"{plan.padding_share:.1%}", "of all positions: computed, but not scored")

    row("steps", f"{plan.total_steps:,}", f"{plan.total_steps / plan.epoch_steps:,.1f} epochs of {plan.epoch_steps:,}")
    if plan.warmup_steps:
        row(
            "  warm-up",
            f"{plan.warmup_steps:,}",
            "longer than training" if plan.warmup_steps > plan.total_steps else "",
        )
    if plan.earliest_stop is not None:
        row("  at least", f"{plan.earliest_stop:,}", f"where patience ({settings.patience}) ends it early")
    row("time", duration(plan.total_seconds), "of all steps; saving left out")
    row("  starting", short_time(plan.startup_seconds), "by which the first steps were slower")
    row("  steps", duration(plan.total_steps * plan.seconds_per_step))
    row("  evaluations", duration(evaluating), f"{plan.num_evaluations:,} x {short_time(plan.seconds_per_evaluation)}")


def row(figure: str, value: str, meaning: str = "") -> None:
    """One line; what is indented is a part of what stands above."""
    style = "not bold" if figure.startswith(" ") else "bold"
    stdout().print(f"[{style}]{figure:17}[/]  {value:>15}" + (f"  [dim]{meaning}[/]" if meaning else ""))


def size(num_bytes: int) -> str:
    """`4.8 MB`."""
    return f"{scaled(num_bytes)}B"


def scaled(number: float) -> str:
    """Three digits and the prefix of a unit: `4.76 M`, `157 G`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:  # what three digits round to the next prefix
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


def short_time(seconds: float) -> str:
    """`55.7 ms`, `4.4 s`."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
