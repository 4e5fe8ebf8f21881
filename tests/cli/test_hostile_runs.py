"""Runs that somebody else made: every command refuses what is crafted in two lines, and no terminal is steered."""

import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lumiere.cli.generate import write
from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import CheckpointError
from lumiere.persistence.runs import Run
from tests.checkpoints import folder_of, rewrite
from tests.cli.commands import invoke, refuse, stdout_of

EXPORT = ["export", "latest", "--to", "transformer-lens", "out"]
USES = (["eval", "latest"], ["generate"], ["inspect", "attention"], EXPORT)
RESUME = ["train", "--resume", "latest"]
STEERING = "\x1b]0;title\x07\x1b[2J\x9b31m\r\b\u202e\ud800[bold red]\n"


@pytest.fixture
def run(run: Run) -> Run:
    """The copy of the trained run, which does not say that there is nothing to resume."""
    run.update(status="interrupted", stop_reason=None)
    return run


def recorded(run: Run, **changes: Any) -> None:
    """Puts values into the metadata of all checkpoints, with their hashes."""
    rewrite(run, lambda checkpoint: replace(checkpoint, metadata=checkpoint.metadata | changes))


def put_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES = ["config.yaml", "tokenizer.json", "checkpoints/pointers.json", "model.safetensors", "checkpoint.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("put", [put_pipe, put_folder, Path.unlink, lambda path: path.write_bytes(b"\x1b[31m\xff\0")])
def test_a_file_that_is_none(run: Run, name: str, put: Callable[[Path], None]) -> None:
    path = run.path / name
    put(path if path.exists() else folder_of(run, "best") / name)
    for command in USES:
        refuse(*command)


@pytest.mark.parametrize("put", [put_pipe, put_folder])
def test_a_resume_with_metrics_that_are_no_file(run: Run, put: Callable[[Path], None]) -> None:
    recorded(run, stop_reason=None, step=8)
    put(run.metrics_path)
    assert "metrics.jsonl" in refuse(*RESUME)[0]


STEPS = (None, "9", -1, True, [])
CONFIGS = ([], {"model": {"d_ff": STEERING}})  # tests/persistence/test_loading.py has more
REASONS = (STEERING, ["max_steps"])
METADATA = [
    *(("step", value, (*USES, RESUME), "step") for value in STEPS),
    *(("config", value, (*USES, RESUME), "does not fit the model in its config.yaml") for value in CONFIGS),
    *(("stop_reason", value, (RESUME,), "gives no reason why it ended") for value in REASONS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value", "commands", "message"), METADATA)
def test_checkpoint_metadata_of_another_type(run: Run, key: str, value: Any, commands: Any, message: str) -> None:
    recorded(run, **{"stop_reason": None, key: value})
    for command in commands:
        assert message in refuse(*command)[0]


def test_a_config_that_describes_another_model_of_the_same_shapes(run: Run) -> None:
    text = run.config_path.read_text()
    changed = (
        text.replace("num_heads: 2", "num_heads: 4").replace("d_key: 8", "d_key: 4").replace("d_value: 8", "d_value: 4")
    )
    run.config_path.write_text(changed)
    recorded(run, stop_reason=None)
    for command in USES:
        assert "does not fit the model in its config.yaml" in refuse(*command)[0]
    assert "was trained with model.num_heads 2, which a resume cannot change to 4" in refuse(*RESUME)[0]


@pytest.mark.parametrize("change", ["d_ff: 10000000000000", "d_ff: .nan", "d_ff: &a [*a]"])
def test_a_config_of_a_gigantic_model(run: Run, change: str) -> None:
    run.config_path.write_text(run.config_path.read_text().replace("d_ff: 32", change))
    for command in USES:
        refuse(*command)


@pytest.mark.parametrize(("key", "value"), [("device", "\x1b[31m"), ("precision", "float8")])
def test_a_record_of_a_device_that_is_none(run: Run, key: str, value: Any) -> None:
    recorded(run, stop_reason=None)
    run.update(**{key: value})
    assert f"training.{key} must be" in refuse(*RESUME)[0]


def test_a_resume_of_a_run_whose_small_things_are_odd(run: Run) -> None:
    recorded(run, stop_reason=None, step=8)
    run.update(resumes=7, status="running", step=STEERING, best_loss=[], epoch={})
    (run.path / ".odd.tmp").mkdir()
    (run.checkpoints_dir / ".odd.tmp").mkdir()
    invoke(*RESUME)
    assert [resumed["step"] for resumed in run.record.resumes] == [8]
    assert (run.status, run.record.step) == ("finished", 12)


def test_a_lock_that_is_a_link_is_not_written_through(run: Run) -> None:
    recorded(run, stop_reason=None, step=8)
    run.update(status="running")
    outside = Path("outside")
    outside.write_text("precious")
    lock = run.path / ".lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(outside.absolute())
    invoke("runs", "ls")
    assert "cannot be locked" in refuse(*RESUME)[0]
    lock.unlink()
    os.mkfifo(lock)
    assert "crashed" in stdout_of("runs", "ls")
    assert outside.read_text() == "precious"


HOSTILE: list[Any] = [STEERING, STEERING * 1000, 7, -1e308, 2**62, True, [STEERING], {STEERING: [1]}, [], {}, None, "é"]


@pytest.mark.slow
@pytest.mark.parametrize("value", HOSTILE)
def test_a_record_steers_no_terminal_and_breaks_no_table(run: Run, value: Any) -> None:
    keys = ("status", "error", "command", "dataset", "step", "best_loss", "best_step", "epoch", "tokens", "device")
    others = ("precision", "num_parameters", "num_trained_parameters", "corpus_sha256", "path", "id", "run", STEERING)
    parent = dict.fromkeys(("run", "checkpoint", "step", "dataset", "parent"), value)
    record = {"parent": {"run": "a", "parent": parent}} | dict.fromkeys((*keys, *others), value)
    run.record_path.write_text(json.dumps(record))
    for command in (["runs", "ls"], ["runs", "show", "latest"]):
        printed, as_json = stdout_of(*command), stdout_of(*command, "--json")
        assert (printed + as_json).replace("\n", "").isprintable()
        assert "title\n" not in printed
        assert len(printed) < 20_000
        shown = json.loads(as_json)
        shown = shown[0] if isinstance(shown, list) else shown
        assert (shown["run"], shown["id"], shown["path"]) == (run.name, run.id, str(run.path))
        assert shown["error"] == value
    assert len(stdout_of("runs", "ls").splitlines()) == 2


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"a" * 300_000])
def test_show_says_so_where_the_config_cannot_be_read(run: Run, content: bytes | None) -> None:
    run.config_path.unlink() if content is None else run.config_path.write_bytes(content)
    shown = stdout_of("runs", "show", "latest")
    assert re.search(r"config\.yaml' (cannot be read|is not)", shown)
    assert run.name in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_model_writes_steers_no_terminal_and_stays_whole_in_a_file(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout = io.StringIO()
    monkeypatch.setattr(stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stdout", stdout)
    text = "a\n\tb\x1b[31m\r\x9b 👩\u200d👧 é"
    write(text)
    assert stdout.getvalue() == ("a\n\tb\\x1b[31m\\r\\x9b 👩\u200d👧 é" if terminal else text)


def swap_tokens(path: Path, *ids: int) -> None:
    """Give two tokens of a tokenizer each other's id."""
    saved = json.loads(path.read_text())
    names = {number: name for name, number in saved["model"]["vocab"].items()}
    first, second = (names[number] for number in ids)
    vocabulary = saved["model"]["vocab"]
    vocabulary[first], vocabulary[second] = ids[1], ids[0]
    path.write_text(json.dumps(saved))


def test_a_tokenizer_with_permuted_ids(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same tokenizer in another layout, as another tool writes it, or as another version of the library would.
    run.tokenizer_path.write_text(json.dumps(json.loads(run.tokenizer_path.read_text()), indent=7))
    run.load_model()
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "fingerprint", "of the other version")
        run.load_model()
    swap_tokens(run.tokenizer_path, 300, 310)
    for command in (*USES, ["inspect", "summary"]):
        assert "tokenizer" in refuse(*command)[0]
    with pytest.raises(CheckpointError):
        run.load_model()
    # A checkpoint that does not name its tokenizer fits any, and who has ids needs no tokenizer.
    swapped = run.tokenizer_path.rename("swapped.json")
    run.load_model()
    recorded(run, tokenizer_sha256=None)
    swapped.rename(run.tokenizer_path)
    run.load_model()
