"""Results of analyses as files and as JSON: numbers or a picture, chosen by the suffix."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lumiere.errors import LumiereError, nearest
from lumiere.files import write_atomically
from lumiere.interpret.result import Result
from lumiere.persistence.metrics import to_json
from lumiere.report.figures.figure import SUFFIXES, Picture, check_drawing, check_place, save_picture

SCHEMA_VERSION = 1


def payload(result: Result, about: Mapping[str, Any]) -> dict[str, Any]:
    """The result as JSON takes it: `about`, the arrays as nested lists, and the receipts.

    Args:
        about: where the result comes from: analysis, run, checkpoint, step, hashes, tokens.
    """
    values = {name: plain(value) for name, value in result.as_dict().items()}
    return {
        "schema_version": SCHEMA_VERSION,
        **about,
        **values,
        "receipts": [receipt.as_dict() for receipt in result.receipts],
    }


def plain(value: Any) -> Any:
    """`value` with arrays and dataclasses as lists and dictionaries."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(item) for name, item in asdict(value).items()}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    return value


def as_json(result: Result, about: Mapping[str, Any]) -> bytes:
    return (to_json(payload(result, about), indent=2) + "\n").encode()


def as_csv(result: Result, about: Mapping[str, Any]) -> bytes:
    """The result's rows under a line of names. What it comes from has no place in a table."""
    text = io.StringIO(newline="")
    writer = None
    for row in result.rows():
        if writer is None:
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    return text.getvalue().encode()


def as_npz(result: Result, about: Mapping[str, Any]) -> bytes:
    """The result's arrays by name, compressed, and as JSON text under `about` all that is no array."""
    arrays = result.arrays()
    rest = {name: value for name, value in payload(result, about).items() if name not in arrays}
    data = io.BytesIO()
    np.savez_compressed(data, about=np.array(json.dumps(rest)), **arrays)  # pyright: ignore[reportArgumentType]
    return data.getvalue()


FORMATS: Mapping[str, Callable[[Result, Mapping[str, Any]], bytes]] = {
    ".json": as_json,
    ".csv": as_csv,
    ".npz": as_npz,
}


def check_export(path: Path) -> None:
    """Refuses a path that no result can be written to, before anything is computed.

    Raises:
        LumiereError: its suffix is none of `FORMATS` and of those of pictures, it is a folder, its folder is not there,
            or it is a picture and matplotlib is not installed.
    """
    endings = (*FORMATS, *SUFFIXES)
    if path.suffix.lower() not in endings:
        guess = nearest(path.suffix.lower(), endings)
        raise LumiereError(
            f"{str(path)!r} has no ending that Lumiere writes",
            f"did you mean {guess}?" if guess else f"it has to end in {', '.join(endings)}",
        )
    check_place(path)
    if path.suffix.lower() in SUFFIXES:
        check_drawing()


def save_result(path: Path, result: Result, about: Mapping[str, Any], draw: Callable[[], Picture]) -> None:
    """Writes a result whole, in the format of the suffix.

    Args:
        about: where it comes from, as for `payload`.
        draw: its picture, asked for where the suffix is that of one.

    Raises:
        LumiereError: as `check_export`, or the file cannot be written.
    """
    check_export(path)
    if path.suffix.lower() in SUFFIXES:
        save_picture(path, draw(), facts_line(about))
        return
    data = FORMATS[path.suffix.lower()](result, about)
    try:
        write_atomically(path, data)
    except OSError as error:
        raise LumiereError(f"{str(path)!r} cannot be written: {error.strerror}", "choose another place") from error


def facts_line(about: Mapping[str, Any]) -> str:
    """Run, checkpoint and text in a line."""
    sides = [about, about["other"]] if "other" in about else [about]
    line = " and ".join(f"{side['run']}, checkpoint {side['checkpoint']} (step {side['step']:,})" for side in sides)
    return f"{line}; {about['source']}" if about["source"] else line
