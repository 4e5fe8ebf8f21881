"""Weights & Biases without a network: what is in the offline folder, read record by record."""

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lumiere.persistence.metrics import read_metrics
from lumiere.persistence.runs import Run, RunStore
from lumiere.training import loggers as wandb_log
from lumiere.training.events import Event, StepEvent, WarningEvent
from lumiere.training.run import resume
from lumiere.training.setup import set_up_resume

wandb = pytest.importorskip("wandb", reason="the package wandb is not installed")
wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")

LOGGED = {"training.loggers": ["wandb"], "training.eval_interval": 3}
BLOCK = 32 * 1024
HEADER = 7


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No login of the user's, no file outside of the test's folder, and no process that outlives the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for folder in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{folder}_DIR", str(tmp_path / "wandb-home" / folder))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()
    yield
    wandb.teardown()
    assert children() == []


def children() -> list[str]:
    """The names of the processes that this one has started and that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:  # it has just ended
            continue
        if fields["PPid"] == str(os.getpid()) and "wandb" in fields["Name"]:
            found.append(fields["Name"])
    return found


def records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: LevelDB's log format, after a header of as many bytes as a chunk's."""
    data, position, record = path.read_bytes(), HEADER, b""
    while position < len(data):
        room = BLOCK - position % BLOCK
        if room < HEADER:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def offline_files(run: Run) -> list[Path]:
    wandb.teardown()  # as at the end of a process: W&B's own process writes its files out
    return sorted((run.path / "wandb").glob(f"offline-run-*-{run.id}/run-{run.id}.wandb"))


def history(path: Path) -> list[dict[str, Any]]:
    """The lines of figures, each with its step."""
    lines = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            lines.append({"step": record.history.step.num} | {k: float(v) for k, v in items.items() if "/" in k})
    return lines


def expected(run: Run, after: int = 0) -> list[dict[str, Any]]:
    """The same by `metrics.jsonl`, with the two lines of a step in one."""
    lines: dict[int, dict[str, Any]] = {}
    for metrics in read_metrics(run.metrics_path):
        line = lines.setdefault(metrics["step"], {"step": metrics["step"]})
        for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu"):
            if key in metrics:
                line[f"train/{key}"] = pytest.approx(metrics[key], rel=1e-3, abs=1e-4)
        for key in ("loss", "perplexity", "bits_per_byte"):
            if f"val_{key}" in metrics:
                line[f"val/{key}"] = metrics[f"val_{key}"]
    return [line for step, line in lines.items() if step > after]


def warnings_of(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, WarningEvent)]


@pytest.mark.slow
def test_offline_it_keeps_the_curves_and_the_config(configure, launch, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    events: list[Event] = []
    run = launch(configure(LOGGED), [events.append]).run
    (warning,) = warnings_of(events)
    assert "keeps this run offline, because WANDB_MODE says so" in warning
    assert f"wandb sync {run.path}/wandb/offline-run-*-{run.id}" in warning
    (path,) = offline_files(run)
    assert history(path) == expected(run)
    (about,) = [record.run for record in records(path) if record.WhichOneof("record_type") == "run"]
    assert (about.run_id, about.display_name, about.project) == (run.id, run.name, "lumiere")
    (model,) = [item.value_json for item in about.config.update if item.key == "model"]
    assert '"context_size":16' in model.replace(" ", "")
    (exit_record,) = [record.exit for record in records(path) if record.WhichOneof("record_type") == "exit"]
    assert exit_record.exit_code == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_without_a_key_it_asks_for_none_and_a_resume_goes_on(configure, launch) -> None:
    def kill_at_five(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == 5:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        launch(configure(LOGGED), [kill_at_five])
    run = RunStore("runs").open("latest")
    # W&B names its folders by the second, and two trainings of this test may fall into one.
    (folder,) = [path.parent for path in offline_files(run)]
    folder.rename(folder.with_name(f"offline-run-20000101_000000-{run.id}"))
    events: list[Event] = []
    resume(set_up_resume(run), run, [events.append])
    (warning,) = warnings_of(events)
    assert "because no API key is configured" in warning
    first, second = offline_files(run)
    assert [line["step"] for line in history(first)] == [1, 2, 3, 4]
    (exit_record,) = [record.exit for record in records(first) if record.WhichOneof("record_type") == "exit"]
    assert exit_record.exit_code == 1
    assert history(second) == expected(run, after=3)


@pytest.mark.slow
def test_without_a_server_it_is_kept_offline(configure, launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    events: list[Event] = []
    run = launch(configure(LOGGED), [events.append]).run
    (warning,) = warnings_of(events)
    assert "because http://127.0.0.1:9 cannot be reached" in warning
    (path,) = offline_files(run)
    assert history(path) == expected(run)


@pytest.mark.slow
def test_a_key_that_is_none_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    wandb.setup(wandb.Settings(silent=True))
    assert not wandb_log.has_key()


@pytest.mark.slow
def test_disabled_it_writes_nothing_and_says_nothing(configure, launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    events: list[Event] = []
    run = launch(configure(LOGGED), [events.append]).run
    assert warnings_of(events) == []
    assert offline_files(run) == []


def test_reachable_is_where_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert wandb_log.is_reachable(f"http://127.0.0.1:{port}")
    assert not wandb_log.is_reachable(f"http://127.0.0.1:{port}")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert wandb_log.is_reachable(f"http://127.0.0.1:{port}")
