"""The runs directory: makes runs, finds them by name, and gives what is in one.

Importing this module loads neither torch nor pydantic, so that listing runs is instant.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import string
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.errors import LumiereError, RunBusyError, RunNotFoundError, nearest
from lumiere.files import parse_json, read_file, write_atomically, writing
from lumiere.persistence.metrics import to_json
from lumiere.persistence.record import RunRecord

if TYPE_CHECKING:
    from lumiere.config.schema import RunConfig
    from lumiere.data.tokenizer import Tokenizer
    from lumiere.models.transformer import Transformer

ID_LENGTH = 8
ID_ALPHABET = string.ascii_lowercase + string.digits
NAME_PATTERN = re.compile(r"run_([a-z0-9]{8})_([0-9]{8}_[0-9]{6})")
TIME_FORMAT = "%Y%m%d_%H%M%S"
# Found in the text of a record: to parse a thousand records, to put them in order, takes a third of a second.
CREATED_AT = re.compile(rb'"created_at": ?"([0-9TZ:.+-]+)"')
MAX_RECORD_BYTES = 4_000_000  # ours have some kB, most of them the command that the user typed
MAX_CANDIDATES = 5  # as many runs an error about an ambiguous name lists

FOLDER_README = """\
# Runs of Lumiere

Each folder `run_<id>_<date>_<time>` is one training run:

| file | what it holds |
|---|---|
| `config.yaml` | the complete config; `lumiere train` repeats the run from it |
| `tokenizer.json` | the tokenizer, as Hugging Face `tokenizers` reads it |
| `metrics.jsonl` | what was measured, one JSON object a line |
| `run.json` | status, device, versions, command |
| `notes.json` | your tags and note, where you wrote some |
| `eval/` | what `lumiere eval` has found, where you called it |
| `checkpoints/` | a folder of safetensors files per step; `pointers.json` says which are `best`, `latest`, `previous` |

`lumiere runs ls` lists the runs; a folder that is deleted is simply gone. Git ignores this folder.
"""


@dataclass(frozen=True)
class Run:
    """One training run: a folder whose name has its id and the local time of its start."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def id(self) -> str:
        return self.name.split("_")[1]

    @property
    def created_at(self) -> datetime:
        """When the run was made, in UTC: by `run.json`, or else by the name, whose local time may occur twice."""
        return self._recorded_time() or _named_time(self.name)

    def command(self, *arguments: str) -> str:
        """`lumiere` with `arguments` that name this run, and `--runs-dir` unless it is in the default folder."""
        is_default = RunStore().runs_dir.resolve() == self.path.parent.resolve()
        return shlex.join(["lumiere", *arguments, *([] if is_default else ["--runs-dir", str(self.path.parent)])])

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def record_path(self) -> Path:
        return self.path / "run.json"

    @property
    def record(self) -> RunRecord:
        """The contents of `run.json`; an empty record if the file is missing or damaged."""
        try:
            return RunRecord.from_json(self._parse_record())
        except OSError:
            return RunRecord()

    @property
    def status(self) -> str:
        """`running`, `finished`, `interrupted` or `failed`, as the record says; `crashed` where it says `running` and
        no process that trains the run shows life (`liveness.is_alive`); `unknown` where it says nothing."""
        from lumiere.persistence.liveness import is_alive

        record = self.record
        return "crashed" if record.status == "running" and not is_alive(self.path, record) else record.status

    def check_not_elsewhere(self) -> None:
        """Refuse a run that another machine trains; whoever holds the lock knows that this one does not.

        Raises:
            RunBusyError: It is running there.
        """
        from lumiere.persistence.liveness import is_alive_elsewhere

        record = self.record
        if record.status == "running" and is_alive_elsewhere(self.path, record):
            raise self.busy(record)

    def busy(self, record: RunRecord) -> RunBusyError:
        """Return the error to raise if a run must not be touched because it is being trained."""
        from lumiere.persistence.liveness import FRESH_SECONDS

        return RunBusyError(
            f"run {self.id} is running on {record.host} (process {record.pid})",
            f"stop it there with Ctrl-C; on another machine, it counts as crashed {FRESH_SECONDS / 60:.0f} minutes "
            "after its last write",
        )

    def update(self, **fields: Any) -> None:
        """Sets `fields` in `run.json`, atomically, and keeps the others; only one process may do so at a time.

        Raises:
            LumiereError: the file cannot be read or written; it is as it was.
        """
        with writing(self.record_path):
            try:
                record = self._parse_record() | fields
            except OSError as error:
                # Only what is missing or no record of ours is written anew, and not what cannot be read right now.
                if error.errno not in (errno.ENOENT, errno.EINVAL, errno.EFBIG):
                    raise
                record = fields
            write_atomically(self.record_path, (to_json(record, indent=2) + "\n").encode())

    def load_config(self) -> RunConfig:
        """The complete config that the run was started with."""
        from lumiere.config.loader import load_config_file

        return load_config_file(self.config_path)

    def load_tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the run was trained with.

        Raises:
            DataError: It cannot be read, or has more tokens than the model has rows.
        """
        from lumiere.persistence.loading import load_tokenizer

        return load_tokenizer(self)

    def load_model(self, checkpoint: str = "best") -> Transformer:
        """Return the model with the weights of `checkpoint`, on the CPU, in evaluation mode.

        Only the weights are read. If there is no `best` yet, `latest` is used.

        Raises:
            CheckpointError: The checkpoint does not exist or is damaged, `config.yaml` describes another model, or
                `tokenizer.json`, if it exists, is not the tokenizer that the checkpoint was trained with.
        """
        from lumiere.persistence.loading import load_model

        return load_model(self, checkpoint)

    def _recorded_time(self) -> datetime | None:
        try:
            found = CREATED_AT.search(read_file(self.record_path, MAX_RECORD_BYTES))
            time = datetime.fromisoformat(found[1].decode()) if found else None
            return time.astimezone(UTC) if time and time.tzinfo else None
        except (OSError, ValueError, OverflowError):
            return None

    def _parse_record(self) -> dict[str, Any]:
        data = read_file(self.record_path, MAX_RECORD_BYTES)
        try:
            record = parse_json(data)
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}


class RunStore:
    """The folder that holds the runs.

    Args:
        runs_dir: the folder; None stands for `LUMIERE_RUNS_DIR`, or `runs` under the current folder.
    """

    def __init__(self, runs_dir: Path | str | None = None) -> None:
        self.runs_dir = Path(runs_dir or os.environ.get("LUMIERE_RUNS_DIR") or "runs")

    def create(self, now: datetime | None = None) -> Run:
        """A new run with an empty `checkpoints` folder; the runs directory is made where there is none.

        Args:
            now: the local time for the run's name.

        Raises:
            LumiereError: the runs directory cannot be written to.
        """
        import secrets

        timestamp = (now or datetime.now()).strftime(TIME_FORMAT)
        try:
            self._make_folder()
            while True:
                run_id = "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH))
                run = Run(self.runs_dir / f"run_{run_id}_{timestamp}")
                if run_id in {other.id for other in self.all()}:
                    continue
                try:
                    os.mkdir(run.path)
                except FileExistsError:  # another process was faster
                    continue
                try:
                    os.mkdir(run.checkpoints_dir)
                except OSError:
                    os.rmdir(run.path)
                    raise
                return run
        except OSError as error:
            raise LumiereError(
                f"no run can be made in {self.runs_dir}/: {error.strerror}",
                "choose another folder with --runs-dir or LUMIERE_RUNS_DIR",
            ) from error

    def all(self) -> list[Run]:
        """The runs, newest first; whatever is not named like a run is left out.

        Raises:
            LumiereError: the runs directory exists, but cannot be read.
        """
        try:
            with os.scandir(self.runs_dir) as entries:
                found = [
                    # Of two runs made at the same time, the one that was written to last is the newer one.
                    (run.created_at, written_at, run.name, run)
                    for entry in entries
                    if _is_run_name(entry.name) and (written_at := _written_at(entry)) is not None
                    for run in [Run(self.runs_dir / entry.name)]
                ]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LumiereError(
                f"{self.runs_dir}/ cannot be read: {error.strerror}",
                "choose another folder with --runs-dir or LUMIERE_RUNS_DIR",
            ) from error
        return [run for *_, run in sorted(found, key=lambda item: item[:3], reverse=True)]

    def open(self, reference: str) -> Run:
        """The run that `reference` stands for: a full name, an id, a unique prefix of the id, or `latest`.

        The reference is only ever compared with the names that are there, never made part of a path.

        Raises:
            RunNotFoundError: it fits no run, or several.
        """
        runs = self.all()
        if reference == "latest" and runs:
            return runs[0]
        fitting = [run for run in runs if reference and (run.id.startswith(reference) or run.name == reference)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            names = ", ".join(run.name for run in fitting[:MAX_CANDIDATES])
            rest = f" and {len(fitting) - MAX_CANDIDATES} more" if len(fitting) > MAX_CANDIDATES else ""
            raise RunNotFoundError(
                f"{reference!r} fits {len(fitting)} runs in {self.runs_dir}/: {names}{rest}",
                "give more letters of the id, or the full name",
            )
        raise RunNotFoundError(f"no run {reference!r} in {self.runs_dir}/", self._hint(reference, runs))

    def _hint(self, reference: str, runs: list[Run]) -> str:
        if not runs:
            return "train one: lumiere train tiny"
        name = reference.rstrip("/").rpartition("/")[2]  # a shell completes the folder's path
        guess = nearest(name, [*(run.id for run in runs), *(run.name for run in runs), "latest"])
        return f"did you mean {guess}?" if guess else "lumiere runs ls lists them"

    def _make_folder(self) -> None:
        self.runs_dir.mkdir(parents=True, exist_ok=True)
        # Only into an empty folder: a .gitignore of ours must not hide what else a user keeps there.
        if any(self.runs_dir.iterdir()):
            return
        files = {self.runs_dir / ".gitignore": b"*\n", self.runs_dir / "README.md": FOLDER_README.encode()}
        try:
            for path, text in files.items():
                write_atomically(path, text)
        except OSError:
            for path in files:  # half of them would look like a folder of the user's
                path.unlink(missing_ok=True)
            raise


def _written_at(entry: os.DirEntry[str]) -> int | None:
    """When a folder was last written to, in nanoseconds; None for what is no folder, or links to itself."""
    try:
        return entry.stat().st_mtime_ns if entry.is_dir() else None
    except OSError:
        return None


def _is_run_name(name: str) -> bool:
    match = NAME_PATTERN.fullmatch(name)
    try:
        return match is not None and bool(_parse_timestamp(match[2]))
    except ValueError:
        return False


def _parse_timestamp(timestamp: str) -> datetime:
    """`20250819_001808` as a time. In ISO form, which is read ten times as fast as by `strptime`."""
    return datetime.fromisoformat(timestamp.replace("_", "T"))


def _named_time(name: str) -> datetime:
    """The time in a run's name, which is local, in UTC."""
    time = _parse_timestamp(name.split("_", 2)[2])
    try:
        return time.astimezone(UTC)
    except (ValueError, OverflowError, OSError):  # the years 1 and 9999
        return time.replace(tzinfo=UTC)
