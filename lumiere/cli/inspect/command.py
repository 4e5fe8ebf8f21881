"""What all analyses share: options, opening the models, computing, verifying, output and the exit code.

An analysis is a function of an `InspectTarget` and its own options that returns an `Analysis`: how to compute, show and
draw a result. `analysis` makes a command of it.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

from typer import Argument, Exit, Option

from lumiere.cli.console import CHECK_FAILED, escape, print_json, show_note, stderr, stdout
from lumiere.cli.inspect.inputs import InspectTarget
from lumiere.cli.options import CheckpointName, Device, Json, RunOption, RunsDir, complete_run, open_model
from lumiere.errors import LumiereError
from lumiere.persistence.loading import OpenedModel

if TYPE_CHECKING:
    from lumiere.interpret.result import Receipt, Result
    from lumiere.models.transformer import Transformer
    from lumiere.report.figures.figure import Picture

PAIR_HELP = "A run, or RUN@CHECKPOINT, such as latest@best or 3ka5@500. Default checkpoint: --checkpoint."
Seed = Annotated[int, Option(min=0, help="Seed of everything drawn at random.")]
Layers = Annotated[
    str | None, Option("--layer", "-l", metavar="LIST", help="Layers, from 0, such as 2 or 0,2-3. \\[default: all]")
]
Heads = Annotated[str | None, Option(metavar="LIST", help="Heads, from 0, such as 1 or 0-2. \\[default: all]")]
Positions = Annotated[
    str | None, Option(metavar="LIST", help="Positions of the text, such as 5 or 0,8-11; -1 is the last.")
]
TopK = Annotated[int, Option(metavar="K", min=1, help="Maximum number of entries in each list.")]
NumBatches = Annotated[int, Option(metavar="N", min=1, help="Number of batches.")]
Verify = Annotated[bool, Option("--verify", help="Recompute in float64 and compare.")]
Output = Annotated[
    Path | None,
    Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write the numbers to .json, .csv or .npz, or the picture to .html, .svg or .png.",
    ),
]


def text_option(kind: Any, name: str, letter: str, text: str, *short: str, **limits: Any) -> tuple[Any, Any]:
    return Annotated[kind | None, Option(f"--{name}", *short, metavar=letter, help=text, **limits)], None


# The type and the default of each option, by parameter name.
PAIR_OPTIONS = {
    "run": (Annotated[str, Argument(metavar="A", help=PAIR_HELP, autocompletion=complete_run)], Parameter.empty),
    "other": (Annotated[str, Argument(metavar="B", help="As A.", autocompletion=complete_run)], Parameter.empty),
}
TEXT_OPTIONS = {
    "prompt": text_option(str, "prompt", "TEXT", "Text to look at.", "-p"),
    "file": text_option(Path, "file", "FILE", "UTF-8 text file: as much of its start as fits."),
    "val": text_option(int, "val", "N", "Window of the validation split, from 0.", min=0),
    "random": text_option(int, "random", "S", "S random tokens, repeated once.", min=1),
}
COMMON_OPTIONS = {
    "seed": (Seed, 0),
    "run": (RunOption, "latest"),
    "checkpoint": (CheckpointName, "best"),
    "device": (Device, "cpu"),
    "verify": (Verify, False),
    "output": (Output, None),
    "as_json": (Json, False),
    "runs_dir": (RunsDir, None),
}

AnyResult = TypeVar("AnyResult", bound="Result")


@dataclass(frozen=True)
class Analysis(Generic[AnyResult]):
    """How to compute, show and draw a result.

    Attributes:
        compute: a pure function, so that `--verify` can call it again with the model in float64.
        show: prints the result; heading and receipts are printed around it.
        draw: returns the picture for `-o FILE.svg`.
        source: what the analysis read, in words, unless it is one text.
        provenance: more entries for the JSON.
    """

    compute: "Callable[[Transformer], AnyResult]"
    show: Callable[[AnyResult], None]
    draw: "Callable[[AnyResult], Picture]"
    source: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def analysis(
    *, text: bool, whole_run: bool = False, pair: bool = False
) -> Callable[[Callable[..., Analysis[Any]]], Callable[..., None]]:
    """Make a command of `describe(target, own options) -> Analysis`, with the shared options.

    Args:
        text: the analysis reads one text: add `--prompt`, `--file`, `--val` and `--random`.
        whole_run: the analysis reads all snapshots of a run: no `--checkpoint`, the model is the last snapshot.
        pair: the analysis compares two models, which are arguments in place of `--run`.
    """
    omitted = {"checkpoint"} if whole_run else {"run"} if pair else set()
    common = {name: option for name, option in COMMON_OPTIONS.items() if name not in omitted}
    shared = (PAIR_OPTIONS if pair else {}) | (TEXT_OPTIONS if text else {}) | common

    def decorate(describe: Callable[..., Analysis[Any]]) -> Callable[..., None]:
        own = list(inspect.signature(describe).parameters.values())[1:]
        parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own] + [
            Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            for name, (annotation, default) in shared.items()
        ]

        def command(**values: Any) -> None:
            run_analysis(describe, {name: values.pop(name) for name in shared}, values)

        command.__name__, command.__doc__ = describe.__name__, describe.__doc__
        # Typer reads the signature and the annotations, which **values does not have.
        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def run_analysis(describe: Callable[..., Analysis[Any]], common: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Open, compute, verify, write or print; exit with 3 if a check fails."""
    from lumiere.device import keep_freed_memory
    from lumiere.interpret.result import agreement
    from lumiere.report.results import check_export, payload, save_result

    keep_freed_memory()  # a pass that keeps its activations frees them at its end, as a training step does
    output = common["output"]
    if output is not None:
        check_export(output)
    target = open_target(common)
    described = describe(target, **own)
    model = target.opened.model
    result = described.compute(model)
    if common["verify"]:
        exact = described.compute(deepcopy(model).cpu().double())  # on the CPU: not every device has float64
        result = replace(result, receipts=(*result.receipts, agreement(result, exact)))
    provenance = provenance_of(describe.__name__, target, described)
    if output is not None:
        save_result(output, result, provenance, lambda: described.draw(result))
        show_note(f"written to {output}")
    if common["as_json"]:
        print_json(payload(result, provenance))
    else:
        show_heading(target, described.source)
        described.show(result)
        show_receipts(result.receipts)
    if not result.holds:
        failed = "; ".join(receipt.check for receipt in result.receipts if not receipt.holds)
        stderr().print(f"[bold red]failed:[/] {escape(failed)}")
        raise Exit(CHECK_FAILED)


def open_target(common: Mapping[str, Any]) -> InspectTarget:
    place = common["device"], common["runs_dir"]
    other = None
    if "other" in common:
        opened, other = (
            open_model(*split_reference(common[side], common["checkpoint"]), *place) for side in ("run", "other")
        )
    else:
        checkpoint = common.get("checkpoint") or last_snapshot(common["run"], common["runs_dir"])
        opened = open_model(common["run"], checkpoint, *place)
    text = {name: common[name] for name in TEXT_OPTIONS if name in common}
    return InspectTarget(opened, text, common["seed"], other)


def split_reference(reference: str, checkpoint: str) -> tuple[str, str]:
    """Return the run and the checkpoint of `RUN@CHECKPOINT`; `checkpoint` if it names none."""
    run, at, named = reference.partition("@")
    if not run or (at and not named):
        raise LumiereError(f"{reference!r} names no checkpoint of a run", "write RUN or RUN@CHECKPOINT: latest@500")
    return run, named or checkpoint


def last_snapshot(reference: str, runs_dir: str | None) -> str:
    """Return the name of a run's last snapshot."""
    from lumiere.persistence.checkpoint_manager import NAMES, checkpoint_names
    from lumiere.persistence.runs import RunStore

    run = RunStore(runs_dir).open(reference)
    snapshots = [name for name in checkpoint_names(run) if name not in NAMES]
    if not snapshots:
        raise LumiereError(f"run {run.id} has no snapshots", "train with training.snapshots=true and do not prune them")
    return snapshots[-1]


def provenance_of(name: str, target: InspectTarget, described: Analysis[Any]) -> dict[str, Any]:
    """Return everything needed to compute a result again: run, checkpoint, hashes, device, seed, text."""
    from lumiere import __version__

    opened = target.opened
    weight = opened.model.token_embedding.weight
    provenance = {
        "analysis": name,
        "lumiere_version": __version__,
        **model_provenance(opened),
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "seed": target.seed,
        "source": described.source,
    }
    if target.other is not None:
        provenance["other"] = model_provenance(target.other)
    if target.has_text:
        tokens, source = target.chosen
        provenance |= {"source": source, "token_ids": list(tokens), "token_labels": target.labels}
    return {**provenance, **described.provenance}


def model_provenance(opened: OpenedModel) -> dict[str, Any]:
    return {
        "run": opened.run.name,
        "checkpoint": opened.checkpoint,
        "step": opened.step,
        "weights_sha256": opened.weights_sha256,
        "tokenizer_sha256": opened.tokenizer.fingerprint,
        "corpus_sha256": opened.run.record.corpus_sha256,
    }


def show_heading(target: InspectTarget, source: str | None) -> None:
    """Print the models and what was read."""
    sides = [("", target.opened)] if target.other is None else [("A  ", target.opened), ("B  ", target.other)]
    for mark, opened in sides:
        stdout().print(f"{mark}[bold]{opened.run.name}[/], checkpoint {opened.checkpoint} (step {opened.step:,})")
    if target.has_text:
        tokens, source = target.chosen
        source += f": {len(tokens)} tokens; token ids {' '.join(map(str, tokens))}"
    if source is not None:
        show_wrapped(f"{escape(source)}\n")


def show_receipts(receipts: "Iterable[Receipt]") -> None:
    """Print the checks with their errors; failed ones in red."""
    for receipt in receipts:
        style, verdict = ("dim", "") if receipt.holds else ("bold red", ": FAILED")
        line = f"receipt: {receipt.check}, error {receipt.error:.0e} (tolerance {receipt.tolerance:.0e}){verdict}"
        stdout().print(f"[{style}]{escape(line)}[/]")


def show_wrapped(text: str, **options: Any) -> None:
    """Print text that Rich wraps at words, instead of the terminal at its edge."""
    stdout().print(text, soft_wrap=False, **options)


def signed_bar(value: float, largest: float, width: int) -> str:
    """Return a bar as markup, in cyan or red by the sign; at most `width` characters, for `largest`."""
    length = round(abs(value) / largest * width) if abs(value) < float("inf") else 0
    bar = f"[cyan]{'█' * length}[/]" if value > 0 else f"[red]{'░' * length}[/]"
    return bar if length else ""
