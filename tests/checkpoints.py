"""Find, change and damage the checkpoints of a run."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lumiere.persistence.checkpoint import Checkpoint, load_checkpoint
from lumiere.persistence.checkpoint_writer import write_checkpoint
from lumiere.persistence.runs import Run
from lumiere.persistence.step_folders import find

FIXTURES = Path(__file__).parent / "fixtures"


def copy_fixture(name: str, runs_dir: Path) -> Run:
    """Copy a run that an earlier version wrote, `run_v1` for example, into a runs directory."""
    run_name = json.loads((FIXTURES / name / "run.json").read_bytes())["name"]
    return Run(Path(shutil.copytree(FIXTURES / name, runs_dir / run_name)))


def checkpoint(step: int, value: float | None = None) -> Checkpoint:
    """Return a small state of a step, with weights of that value, or of the step's number."""
    values = torch.full((3,), step if value is None else value, dtype=torch.float64)
    return Checkpoint({"weight": values}, {"weight.step": values}, {"cpu": values.byte()}, {"step": step})


def folder_of(run: Run, name: str) -> Path:
    """Return the folder of the checkpoint `name`."""
    folder = find(run.checkpoints_dir, name)
    assert folder is not None
    return folder


def remove_pointers(run: Run, *names: str) -> None:
    """Take names from their checkpoints, as a kill or a user may."""
    path = run.checkpoints_dir / "pointers.json"
    pointers = {name: target for name, target in json.loads(path.read_text()).items() if name not in names}
    path.write_text(json.dumps(pointers))


def rewrite(run: Run, change: Callable[[Checkpoint], Checkpoint]) -> None:
    """Replace the contents of all full checkpoints, with hashes that are right."""
    for folder in run.checkpoints_dir.glob("step-*"):
        checkpoint = change(load_checkpoint(folder))
        shutil.rmtree(folder)
        write_checkpoint(folder, checkpoint)


def plant(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint, and give the manifest its length and hash."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    for file in manifest["files"]:
        if file["name"] == name:
            file |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seal(folder, manifest)


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint with the hash that fits it."""
    contents = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(contents, sort_keys=True, separators=(",", ":"))
    sealed = contents | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "checkpoint.json").write_text(json.dumps(sealed, indent=1))
