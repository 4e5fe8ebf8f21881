"""The runs directory: create runs, find them by name, read their files.

Importing this module loads neither torch nor pydantic, so that listing runs is fast.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.errors import DataError, LumiereError, RunBusyError, RunNotFoundError, nearest
from lumiere.files import DISK, Disk, parse_json, read_file, writing
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
# Searched in the text: parsing a thousand records in order to sort them takes a third of a second.
CREATED_AT = re.compile(rb'"created_at": ?"([0-9TZ:.+-]+)"')
MAX_RECORD_BYTES = 4_000_000  # ours have some kB
MAX_CANDIDATES = 5  # listed in an error about an ambiguous name

FOLDER_README = """\
# Runs of Lumiere

Each folder `run_<id>_<date>_<time>` is one training run:

| file | contents |
|---|---|
| `config.yaml` | the complete config; `lumiere train` repeats the run from it |
| `tokenizer.json` | the tokenizer, in the format of Hugging Face `tokenizers` |
| `tokenizer_config.json` | of a tokenizer from elsewhere: its start and end tokens, and its chat template |
| `metrics.jsonl` | losses and speed, one JSON object per line |
| `run.json` | status, device, versions, command |
| `notes.json` | your tags and note |
| `eval/` | results of `lumiere eval` |
| `checkpoints/` | a folder of safetensors files per step; `pointers.json` says which are `best`, `latest`, `previous` |

`lumiere runs ls` lists the runs. Deleting a folder deletes the run. Git ignores this folder.
"""


@dataclass(frozen=True)
class Run:
    """One training run: a folder named by its id and the local time of its start.

    Attributes:
        disk: The operations that change its files.
    """

    path: Path
    disk: Disk = field(default=DISK, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def id(self) -> str:
        return self.name.split("_")[1]

    @property
    def created_at(self) -> datetime:
        """The time of creation, in UTC, from `run.json`, or else from the name, whose local time may be ambiguous."""
        return self._recorded_time() or _named_time(self.name)

    def command(self, *arguments: str) -> str:
        """Return the command `lumiere ARGUMENTS`, with `--runs-dir` unless the run is in the default folder."""
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
        """`running`, `finished`, `interrupted` or `failed`, as recorded; `crashed` if it is recorded as running and no
        process trains it (`liveness.is_alive`); `unknown` if nothing is recorded."""
        from lumiere.persistence.liveness import is_alive

        record = self.record
        return "crashed" if record.status == "running" and not is_alive(self.path, record) else record.status

    def check_not_elsewhere(self) -> None:
        """Check that no other machine trains the run. The caller holds the lock, so this machine does not.

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
        """Set `fields` in `run.json` atomically; keep the others. Only one process at a time may do so.

        Raises:
            LumiereError: The file cannot be read or written; it is unchanged.
        """
        with writing(self.record_path):
            try:
                record = self._parse_record() | fields
            except OSError as error:
                # Replace a file that is missing or not a record, but not one that cannot be read right now.
                if error.errno not in (errno.ENOENT, errno.EINVAL, errno.EFBIG):
                    raise
                record = fields
            self.disk.write(self.record_path, (to_json(record, indent=2) + "\n").encode())

    def load_config(self) -> RunConfig:
        """Return the complete config that the run was started with."""
        from lumiere.config.loader import load_config_file

        return load_config_file(self.config_path)

    def load_tokenizer(self, config: RunConfig | None = None) -> Tokenizer:
        """Return the tokenizer that the run was trained with.

        Args:
            config: The run's config, if it has been read.

        Raises:
            DataError: It cannot be read, or has more tokens than the model has rows.
        """
        from lumiere.data.foreign_tokenizer import load_tokenizer

        tokenizer, rows = load_tokenizer(self.tokenizer_path), (config or self.load_config()).tokenizer.vocab_size
        if len(tokenizer) > rows:
            raise DataError(
                f"{str(self.tokenizer_path)!r} has {len(tokenizer):,} tokens, the model in config.yaml {rows:,}",
                "restore the tokenizer that the run was trained with",
            )
        return tokenizer

    def given_tokenizer(self, config: RunConfig) -> Tokenizer | None:
        """Return the tokenizer if the run was given it; None if it was trained on the run's corpus."""
        return self.load_tokenizer(config) if config.tokenizer.path or self.record.parent else None

    def save_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Write the tokenizer's files."""
        for name, text in tokenizer.files().items():
            self.disk.write(self.path / name, text.encode())

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
        runs_dir: The folder. Default: `LUMIERE_RUNS_DIR`, or `runs` in the current folder.
        disk: The operations that change files.
    """

    def __init__(self, runs_dir: Path | str | None = None, disk: Disk = DISK) -> None:
        self.disk = disk
        self.runs_dir = Path(runs_dir or os.environ.get("LUMIERE_RUNS_DIR") or "runs")

    def create(self, now: datetime | None = None) -> Run:
        """Create a run with an empty `checkpoints` folder, and the runs directory if it does not exist.

        Args:
            now: Local time for the run's name.

        Raises:
            LumiereError: The runs directory cannot be written to.
        """
        import secrets

        timestamp = (now or datetime.now()).strftime(TIME_FORMAT)
        try:
            self.make_folder()
            while True:
                run_id = "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH))
                run = Run(self.runs_dir / f"run_{run_id}_{timestamp}", self.disk)
                if run_id in {other.id for other in self.all()}:
                    continue
                try:
                    self.disk.make_folder(run.path)
                except FileExistsError:  # another process was faster
                    continue
                try:
                    self.disk.make_folder(run.checkpoints_dir)
                except OSError:
                    run.path.rmdir()
                    raise
                return run
        except OSError as error:
            raise LumiereError(
                f"no run can be made in {self.runs_dir}/: {error.strerror}",
                "choose another folder with --runs-dir or LUMIERE_RUNS_DIR",
            ) from error

    def all(self) -> list[Run]:
        """Return the runs, newest first; other files and folders are ignored.

        Raises:
            LumiereError: The runs directory exists, but cannot be read.
        """
        try:
            with os.scandir(self.runs_dir) as entries:
                found = [
                    # Of two runs created at the same time, the one written to last is newer.
                    (run.created_at, written_at, run.name, run)
                    for entry in entries
                    if is_run_name(entry.name) and (written_at := _written_at(entry)) is not None
                    for run in [Run(self.runs_dir / entry.name, self.disk)]
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
        """Return the run with this full name, id, unique prefix of an id or tag of a single run, or the `latest`.

        The reference is compared with existing names; it never becomes part of a path.

        Raises:
            RunNotFoundError: It matches no run, or several.
        """
        runs = self.all()
        if reference == "latest" and runs:
            return runs[0]
        matching = [run for run in runs if reference and (run.id.startswith(reference) or run.name == reference)]
        if not matching:
            from lumiere.persistence.notes import read_notes

            matching = [run for run in runs if reference in read_notes(run).tags]
        if len(matching) == 1:
            return matching[0]
        if matching:
            names = ", ".join(run.name for run in matching[:MAX_CANDIDATES])
            rest = f" and {len(matching) - MAX_CANDIDATES} more" if len(matching) > MAX_CANDIDATES else ""
            raise RunNotFoundError(
                f"{reference!r} matches {len(matching)} runs in {self.runs_dir}/: {names}{rest}",
                "give more letters of the id, or the full name",
            )
        raise RunNotFoundError(f"no run {reference!r} in {self.runs_dir}/", self._hint(reference, runs))

    def open_all(self, references: Iterable[str]) -> list[Run]:
        """Return the runs with these references in order, each run once.

        Raises:
            RunNotFoundError: As `open`.
        """
        return list(dict.fromkeys(map(self.open, references)))

    def _hint(self, reference: str, runs: list[Run]) -> str:
        if not runs:
            return "train one: lumiere train tiny"
        name = reference.rstrip("/").rpartition("/")[2]  # shells complete the folder's path
        guess = nearest(name, [*(run.id for run in runs), *(run.name for run in runs), "latest"])
        return f"did you mean {guess}?" if guess else "lumiere runs ls lists them"

    def make_folder(self) -> None:
        """Make the runs directory if it does not exist; raise OSError if that fails."""
        self.disk.make_folder(self.runs_dir, exist_ok=True)
        # Only into an empty folder: our .gitignore must not hide a user's other files.
        if any(self.runs_dir.iterdir()):
            return
        files = {self.runs_dir / ".gitignore": b"*\n", self.runs_dir / "README.md": FOLDER_README.encode()}
        try:
            for path, text in files.items():
                self.disk.write(path, text)
        except OSError:
            for path in files:  # one alone would look like the user's folder
                path.unlink(missing_ok=True)
            raise


def split_reference(reference: str, checkpoint: str) -> tuple[str, str]:
    """Return the run and the checkpoint of `RUN@CHECKPOINT`; `checkpoint` if it names none."""
    run, at, named = reference.partition("@")
    if not run or (at and not named):
        raise LumiereError(f"{reference!r} is neither RUN nor RUN@CHECKPOINT", "for example latest, or latest@500")
    return run, named or checkpoint


def _written_at(entry: os.DirEntry[str]) -> int | None:
    """Return when a folder was last written to, in nanoseconds; None for anything else, or a link to itself."""
    try:
        return entry.stat().st_mtime_ns if entry.is_dir() else None
    except OSError:
        return None


def is_run_name(name: str) -> bool:
    """Return whether a folder of this name may be a run."""
    match = NAME_PATTERN.fullmatch(name)
    try:
        return match is not None and bool(_parse_timestamp(match[2]))
    except ValueError:
        return False


def _parse_timestamp(timestamp: str) -> datetime:
    """Parse `20250819_001808`. In ISO form this is ten times as fast as by `strptime`."""
    return datetime.fromisoformat(timestamp.replace("_", "T"))


def _named_time(name: str) -> datetime:
    """Return the local time in a run's name as UTC."""
    time = _parse_timestamp(name.split("_", 2)[2])
    try:
        return time.astimezone(UTC)
    except (ValueError, OverflowError, OSError):  # the years 1 and 9999
        return time.replace(tzinfo=UTC)
