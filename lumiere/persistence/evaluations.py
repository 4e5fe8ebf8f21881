"""What `lumiere eval` has found out about a run, one JSON file an evaluation in the run's folder `eval/`.

Importing this module loads no torch. No lock is taken: a run may be evaluated while another process trains it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumiere.errors import LumiereError, printable
from lumiere.files import parse_json, read_file
from lumiere.persistence.atomic import write_atomically
from lumiere.persistence.metrics import as_number, to_json
from lumiere.persistence.runs import Run

FOLDER = "eval"
SUFFIX = ".json"
MAX_BYTES = 50_000_000  # some hundred thousand documents
MAX_FILES = 1000
NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,200}")
FIGURES = ("loss", "perplexity", "bits_per_byte", "word_perplexity", "accuracy")


@dataclass(frozen=True)
class KeptEvaluation:
    """The heart of an evaluation that is kept; None for what its file does not say.

    Attributes:
        name: of the file, without its suffix.
        protocol: `windows`, or `stride-<N>`.
        figures: those of `FIGURES`.
        problem: why the file cannot be read.
    """

    name: str
    checkpoint: str | None = None
    step: int | float | None = None
    corpus: str | None = None
    corpus_sha256: str | None = None
    protocol: str | None = None
    figures: Mapping[str, int | float | None] | None = None
    problem: str | None = None


def evaluation_name(checkpoint: str, corpus: str, corpus_sha256: str, protocol: str) -> str:
    """The name under which an evaluation is kept: the same question has the same name, and the newer answer stays."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.basename(corpus)).strip("-.")[:60]
    return f"{checkpoint}-{readable or 'text'}-{corpus_sha256[:8]}-{protocol}"


def save_evaluation(run: Run, name: str, values: Mapping[str, Any]) -> Path:
    """Keeps an evaluation, atomically, in the place of an older one of the same name.

    Raises:
        LumiereError: it cannot be written, or `eval` is a link, which could lead out of the run's folder.
        ValueError: `name` is no name for a file.
    """
    if not NAME_PATTERN.fullmatch(name) or name.startswith("."):
        raise ValueError(f"{name!r} is no name for an evaluation")
    folder = run.path / FOLDER
    path = folder / f"{name}{SUFFIX}"
    if folder.is_symlink():
        raise LumiereError(f"{str(folder)!r} is a link", "remove it: evaluations are kept in the run's own folder")
    try:
        folder.mkdir(exist_ok=True)
        write_atomically(path, (to_json(values) + "\n").encode())
    except OSError as error:
        raise LumiereError(
            f"{str(path)!r} cannot be written: {error.strerror or error}", "make room or check the folder"
        ) from error
    return path


def read_evaluations(run: Run) -> list[KeptEvaluation]:
    """The evaluations that are kept with a run, by name; the first `MAX_FILES`, where somebody put more there."""
    folder = run.path / FOLDER
    try:
        names = sorted(entry for entry in os.listdir(folder) if entry.endswith(SUFFIX) and not entry.startswith("."))
    except OSError:  # there is none
        return []
    return [_read(folder / name) for name in names[:MAX_FILES]]


def _read(path: Path) -> KeptEvaluation:
    name = printable(path.name.removesuffix(SUFFIX))
    try:
        values = parse_json(read_file(path, MAX_BYTES))
    except OSError as error:
        return KeptEvaluation(name, problem=error.strerror or str(error))
    except ValueError as error:
        return KeptEvaluation(name, problem=printable(str(error)))
    if not isinstance(values, dict):
        return KeptEvaluation(name, problem="it is no evaluation")

    def text(key: str) -> str | None:
        value = values.get(key)
        return value if isinstance(value, str) else None

    return KeptEvaluation(
        name,
        text("checkpoint"),
        as_number(values.get("step")),
        text("corpus"),
        text("corpus_sha256"),
        text("protocol"),
        {key: as_number(values.get(key)) for key in FIGURES},
    )
