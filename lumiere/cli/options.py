"""Options that mean the same in every command."""

from typing import Annotated, Optional

import typer

from lumiere.cli.completion import complete_checkpoint, complete_config, complete_run

CONFIG_HELP = "A YAML or TOML file, or a shipped config's name: tiny, induction, small, small-fast."
RUN_HELP = "A run's name, its id or the start of it, or latest."

Config = Annotated[str, typer.Argument(help=CONFIG_HELP, autocompletion=complete_config)]
OptionalConfig = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(help=CONFIG_HELP, autocompletion=complete_config),
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 (Typer reads this form)
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as model.num_layers=6. Repeatable."),
]
# Text and not a Path, for which Typer would load pydantic: `runs ls` is to answer at once.
RunsDir = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--runs-dir", metavar="DIR", help="Where the runs are. \\[default: $LUMIERE_RUNS_DIR or runs]"),
]
RunReference = Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP, autocompletion=complete_run)]
RunReferences = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="Names, ids or the start of them, or latest.", autocompletion=complete_run),
]
RunOption = Annotated[str, typer.Option("--run", "-r", metavar="RUN", help=RUN_HELP, autocompletion=complete_run)]
CheckpointName = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        "-c",
        metavar="NAME",
        help="best, latest, previous, or a step with a snapshot.",
        autocompletion=complete_checkpoint,
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1 or mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, for scripts.")]
