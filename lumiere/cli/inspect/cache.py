"""`lumiere inspect cache`."""

import inspect
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from lumiere.api.activations import SHARD_MB
from lumiere.api.inspection import Inspect
from lumiere.cli.console import print_json, show_note, size, stdout
from lumiere.cli.inspect.command import analysis, open_runs
from lumiere.errors import LumiereError

if TYPE_CHECKING:
    from lumiere.api.analysis import Analysis
    from lumiere.interpret.activation_dataset import ActivationDataset
    from lumiere.interpret.activation_writer import Plan
    from lumiere.interpret.activations import Activations

Names = Annotated[
    list[str] | None,
    Option(
        metavar="GLOB",
        help="Activations, such as 'blocks.*.attn.hook_pattern'. Repeatable. \\[default: all; with --split, "
        "'*.hook_resid_post']",
    ),
]
SPLIT_OPTIONS: dict[str, tuple[Any, Any]] = {
    "split": (
        Annotated[
            str | None,
            Option(metavar="NAME", help="Write a whole split, validation or train, to the folder -o DIR."),
        ],
        None,
    ),
    "dtype": (Annotated[str, Option(metavar="TYPE", help="With --split: float32 or float16.")], "float32"),
    "kind": (
        Annotated[str, Option("--format", metavar="NAME", help="With --split: safetensors or parquet.")],
        "safetensors",
    ),
    "shard_mb": (
        Annotated[int, Option(metavar="MB", min=1, help="With --split: size of a file, held in memory.")],
        SHARD_MB,
    ),
}
OTHERS = {name: f"--{name}" for name in ("prompt", "file", "val", "random", "verify")} | {
    "max_tokens": "--context-size"
}
"""Options that a whole split does not take."""


def counted(files: int) -> str:
    return "1 file" if files == 1 else f"{files:,} files"


def show_activations(found: "Analysis[Activations]") -> None:
    """Which activations are there? Lists their names and shapes; -o FILE.npz saves them.

    The names are those of TransformerLens. A .json or .csv file contains the list without the values.

    With --split, the activations of a whole split go to the folder -o DIR, one row per position, with token ids; the
    same command resumes it. In Python, lumiere.open_activations(DIR) reads them.
    """
    result = found.result
    width = max(map(len, result.names))
    for row in result.rows():
        shape = " x ".join(row["shape"].split())
        stdout().print(f"{row['name']:{width}}  {row['axes']:5}  {shape:>13}  {size(row['num_bytes']):>8}")
    stdout().print(f"\n{len(result.names):,} activations, {size(sum(result.num_bytes))}")


of_text = analysis(Inspect.cache, names=Names)(show_activations)


def cache(**values: Any) -> None:
    of_split = {name: values.pop(name) for name in SPLIT_OPTIONS}
    if of_split["split"] is not None:
        write_split(values, of_split)
        return
    for name, (_, default) in SPLIT_OPTIONS.items():
        if of_split[name] != default:
            option = "format" if name == "kind" else name.replace("_", "-")
            raise LumiereError(f"--{option} needs --split", "add --split validation, and a folder with -o DIR")
    of_text(**values)


# Typer reads the signature and the annotations: those of the analysis, and `SPLIT_OPTIONS` before the shared ones.
_names, *_shared = inspect.signature(of_text).parameters.values()
_own = [
    Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=it) for name, (kind, it) in SPLIT_OPTIONS.items()
]
cache.__doc__ = show_activations.__doc__
cache.__signature__ = inspect.Signature([_names, *_own, *_shared])  # pyright: ignore[reportFunctionMemberAccess]
cache.__annotations__ = {parameter.name: parameter.annotation for parameter in (_names, *_own, *_shared)}


def write_split(common: dict[str, Any], options: dict[str, Any]) -> None:
    """Write a whole split, and print what was written."""
    from lumiere.cli.progress import CountProgress

    output: Path | None = common["output"]
    if output is None or output.suffix in (".npz", ".json", ".csv", ".html", ".svg", ".png"):
        raise LumiereError("--split writes a folder of files", "give one with -o DIR")
    if given := [option for name, option in OTHERS.items() if common.get(name) not in (None, False)]:
        raise LumiereError(f"{given[0]} does not go with --split", "leave one of them out")
    [run] = open_runs(common)

    def announce(planned: "Plan", done: int) -> None:
        files = counted(len(planned.rows_per_shard))
        there = f", {done:,} of them there already" if done else ""
        rows = f"{planned.dataset.num_rows:,} rows, {size(planned.num_bytes)}"
        show_note(f"the {planned.split} split: {rows} in {files}{there}")

    with CountProgress("files") as progress:
        dataset = run.inspect.save_activations(
            output, names=common["names"], announce=announce, progress=progress, **options
        )
    if common["as_json"]:
        print_json({"folder": str(output), **dataset.summary()})
        return
    show_dataset(dataset)


def show_dataset(dataset: "ActivationDataset") -> None:
    width = max(map(len, dataset.shapes))
    for name, shape in dataset.shapes.items():
        stdout().print(f"{name:{width}}  {' x '.join(map(str, (dataset.num_rows, *shape)))}", highlight=False)
    stdout().print(
        f"\n{dataset.num_rows:,} rows in {dataset.dtype}, {size(dataset.num_bytes)} in {counted(len(dataset.shards))}: "
        f"{dataset.folder}",
        highlight=False,
    )
