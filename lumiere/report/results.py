"""Results of analyses as JSON, CSV, NPZ or a picture, chosen by the suffix of the file."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lumiere.errors import LumiereError, nearest
from lumiere.interpret.result import Result
from lumiere.persistence.metrics import to_json
from lumiere.report.figures.figure import SUFFIXES, Picture, check_output, check_picture, save_picture, write_output

SCHEMA_VERSION = 1


def payload(result: Result, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `--json` prints: provenance, arrays as nested lists, and receipts.

    Args:
        provenance: analysis, run, checkpoint, step, hashes and tokens.
    """
    receipts = [receipt.as_dict() for receipt in result.receipts]
    values = {name: plain(value) for name, value in result.as_dict().items()}
    return {"schema_version": SCHEMA_VERSION, **provenance, **values, "receipts": receipts}


def plain(value: Any) -> Any:
    """Convert arrays and dataclasses to lists and dictionaries."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    return value


def as_json(result: Result, provenance: Mapping[str, Any]) -> bytes:
    return (to_json(payload(result, provenance), indent=2) + "\n").encode()


def as_csv(result: Result, provenance: Mapping[str, Any]) -> bytes:
    """The result's rows below a header; provenance has no place in a table."""
    text = io.StringIO(newline="")
    writer = None
    for row in result.rows():
        if writer is None:
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    return text.getvalue().encode()


def as_npz(result: Result, provenance: Mapping[str, Any]) -> bytes:
    """The result's arrays by name, compressed; everything else as JSON text under `about`."""
    arrays = result.arrays()
    rest = {name: value for name, value in payload(result, provenance).items() if name not in arrays}
    data = io.BytesIO()
    np.savez_compressed(data, about=np.array(json.dumps(rest)), **arrays)  # pyright: ignore[reportArgumentType]
    return data.getvalue()


FORMATS: Mapping[str, Callable[[Result, Mapping[str, Any]], bytes]] = {".json": as_json, ".csv": as_csv, ".npz": as_npz}


def check_export(path: Path) -> None:
    """Check that a result can be written to `path`, before anything is computed.

    Raises:
        LumiereError: unknown suffix, the path is a directory, its directory does not exist, or it is a picture and
            matplotlib is not installed.
    """
    suffixes, suffix = (*FORMATS, *SUFFIXES), path.suffix.lower()
    if suffix not in suffixes:
        guess = nearest(suffix, suffixes)
        raise LumiereError(
            f"{str(path)!r} has no suffix that Lumiere can write",
            f"did you mean {guess}?" if guess else f"end the name in {', '.join(suffixes)}",
        )
    (check_picture if suffix in SUFFIXES else check_output)(path)


def save_result(path: Path, result: Result, provenance: Mapping[str, Any], draw: Callable[[], Picture]) -> None:
    """Write a result atomically, in the format of the suffix.

    Args:
        provenance: as for `payload`.
        draw: returns the picture, called only if the suffix asks for one.

    Raises:
        LumiereError: matplotlib is not installed, or the file cannot be written.
    """
    if path.suffix.lower() in SUFFIXES:
        save_picture(path, draw(), facts_line(provenance))
    else:
        write_output(path, FORMATS[path.suffix.lower()](result, provenance))


def facts_line(provenance: Mapping[str, Any]) -> str:
    """Runs, checkpoints and text in one line."""
    sides = [provenance, provenance["other"]] if "other" in provenance else [provenance]
    line = " and ".join(f"{side['run']}, checkpoint {side['checkpoint']} (step {side['step']:,})" for side in sides)
    return f"{line}; {provenance['source']}" if provenance["source"] else line
