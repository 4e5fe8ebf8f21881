"""What all analyses share: options, opening the models, output and the exit code.

A command prints what a method of `lumiere.api.inspection.Inspect` finds; `analysis` makes it of both.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option

from lumiere.cli.console import CHECK_FAILED, escape, print_json, show_note, stderr, stdout
from lumiere.cli.options import CheckpointName, Device, Json, MaxTokens, RunOption, RunsDir, complete_run

if TYPE_CHECKING:
    from lumiere.api.analysis import Analysis
    from lumiere.api.runs import OpenedRun
    from lumiere.api.target import InspectTarget
    from lumiere.interpret.result import Receipt

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
CONTRAST_OPTIONS: dict[str, Any] = {
    "corrupt": Annotated[
        str | None, Option(metavar="TEXT", help="The prompt without the behavior: as many tokens as --prompt.")
    ],
    "target": Annotated[
        str | None,
        Option(metavar="TOKEN", help="Token to predict. \\[default: the most probable after the clean prompt]"),
    ],
    "vs": Annotated[
        str | None,
        Option(metavar="TOKEN", help="Token to compare it with. \\[default: the most probable after the corrupt one]"),
    ],
    "pairs": Annotated[
        Path | None,
        Option(metavar="FILE", help='Prompts, one JSON object a line: {"clean", "corrupt", "target", "vs", "group"}.'),
    ],
}
"""Types of the options of `lumiere.api.pairs.read_pairs`."""
MetricName = Annotated[
    str | None,
    Option(
        "--metric",
        "-m",
        metavar="NAME",
        help="logit-difference, log-probability, loss, probability or kl. "
        "\\[default: logit-difference; without --vs, log-probability]",
    ),
]
MAX_TOKENS = {"max_tokens": (MaxTokens, None)}
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

# A command shows the result of a method of `Inspect`.
Show = Callable[..., None]


Method = Callable[..., "Analysis[Any]"]


def analysis(method: Method, *, whole_run: bool = False, **options: Any) -> Callable[[Show], Show]:
    """Make a command of `show(found, own options)`, which prints what a method of `Inspect` finds.

    Its options are those of the method, with the method's defaults, those of `show`, and the shared ones. The method
    says whether it reads a text (`prompt`) and whether it compares two models (`other`).

    Args:
        whole_run: the analysis reads all snapshots of a run: no `--checkpoint`.
        options: types of the method's options, by name.
    """
    defaults = inspect.signature(method).parameters
    is_pair = "other" in defaults
    omitted = {"checkpoint"} if whole_run else {"run"} if is_pair else set()
    common = {name: option for name, option in COMMON_OPTIONS.items() if name not in omitted}
    shared = (PAIR_OPTIONS if is_pair else {}) | (TEXT_OPTIONS | MAX_TOKENS if "prompt" in defaults else {}) | common

    def decorate(show: Show) -> Show:
        own = {name: (annotation, defaults[name].default) for name, annotation in options.items()}
        displayed = list(inspect.signature(show).parameters.values())[1:]
        only_shown = {option.name: (option.annotation, option.default) for option in displayed}
        parameters = [
            Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            for name, (annotation, default) in (only_shown | own | shared).items()
        ]

        def command(**values: Any) -> None:
            of_show = {option.name: values[option.name] for option in displayed}
            of_method = {name: values[name] for name in own}
            common = {name: values[name] for name in shared}
            run_analysis(method, of_method, common, lambda found: show(found, **of_show))

        command.__name__, command.__doc__ = show.__name__, show.__doc__
        # Typer reads the signature and the annotations, which **values does not have.
        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def run_analysis(
    method: Method,
    own: Mapping[str, Any],
    common: Mapping[str, Any],
    show: "Callable[[Analysis[Any]], None]",
) -> None:
    """Open, compute, verify, write or print; exit with 3 if a check fails."""
    from lumiere.cli.progress import CountProgress
    from lumiere.report.results import check_export, payload

    output = common["output"]
    if output is not None:
        check_export(output)
    run, *others = open_runs(common)
    text = {name: common[name] for name in TEXT_OPTIONS if name in common}
    drawn = {"seed": common["seed"], "verify": common["verify"]}
    if "progress" in inspect.signature(method).parameters:
        with CountProgress("snapshots" if method.__name__ == "dynamics" else "steps") as progress:
            found = method(run.inspect, *others, **own, **text, **drawn, progress=progress)
    else:
        found = method(run.inspect, *others, **own, **text, **drawn)
    if output is not None:
        found.save(output)
        show_note(f"written to {output}")
    if common["as_json"]:
        print_json(payload(found.result, found.provenance))
    else:
        show_heading(found.target, found.source)
        show(found)
        show_receipts(found.result.receipts)
    if not found.result.holds:
        failed = "; ".join(receipt.check for receipt in found.result.receipts if not receipt.holds)
        stderr().print(f"[bold red]failed:[/] {escape(failed)}")
        raise Exit(CHECK_FAILED)


def open_runs(common: Mapping[str, Any]) -> "list[OpenedRun]":
    """Return the run, or both runs of a comparison."""
    from lumiere.api.runs import OpenedRun
    from lumiere.cli.progress import CorpusProgress
    from lumiere.persistence.runs import RunStore, split_reference

    store, checkpoint = RunStore(common["runs_dir"]), common.get("checkpoint", "best")
    sides = [(common["run"], checkpoint)]
    if "other" in common:
        sides = [split_reference(common[side], checkpoint) for side in ("run", "other")]
    return [
        OpenedRun(store.open(run), checkpoint, common["device"], common.get("max_tokens"), show_note, CorpusProgress)
        for run, checkpoint in sides
    ]


def show_heading(target: "InspectTarget", source: str | None) -> None:
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
