"""TensorBoard's files, read by its own reader; W&B's offline folder, record by record; Trackio's database, by SQL."""

import json
import os
import socket
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lumiere.config.loader import dump_config
from lumiere.persistence.metrics import read_metrics
from lumiere.persistence.runs import Run
from lumiere.training.loggers import has_key, is_reachable
from tests.training.short import at_step, only_run, raising, resume, short, train

TRAIN = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu")
TAGS = {name: f"train/{name}" for name in TRAIN}
TAGS |= {f"val_{name}": f"val/{name}" for name in ("loss", "perplexity", "bits_per_byte")}
Curves = dict[str, list[tuple[int, Any]]]


def expected(run: Run, after: int = 0) -> Curves:
    """The curves by `metrics.jsonl`: rounded there, and float32 here."""
    found: Curves = {}
    for line in read_metrics(run.metrics_path):
        for key, tag in TAGS.items():
            if key in line and line["step"] > after:
                found.setdefault(tag, []).append((line["step"], pytest.approx(line[key], rel=1e-3, abs=1e-4)))
    return found


def killed_at(step: int, **changes: Any) -> Run:
    """A run that dies during a step, whose metrics are in its `metrics.jsonl` already."""
    with pytest.raises(RuntimeError, match="killed"):
        train(short(**changes), at_step(step, raising(RuntimeError("killed"))))
    return only_run()


# TensorBoard

BOARD: dict[str, Any] = {"loggers": ["tensorboard"], "eval_interval": 3}


def board(run: Run) -> Any:
    """Everything that TensorBoard would show of a run."""
    name = "tensorboard.backend.event_processing.event_accumulator"
    reader = pytest.importorskip(name, reason="the package tensorboard is not installed")
    return reader.EventAccumulator(str(run.path / "tensorboard")).Reload()


def board_curves(run: Run) -> Curves:
    reader = board(run)
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_has_the_curves_the_config_and_the_hyperparameters() -> None:
    messages = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    config = short(**BOARD)
    run = train(config).run
    assert set(expected(run)) == set(TAGS.values())
    assert board_curves(run) == expected(run)
    assert [step for step, _ in board_curves(run)["val/loss"]] == [3, 5, 6]
    reader = board(run)
    (text,) = reader.Tensors("config/text_summary")
    assert dump_config(config) in text.tensor_proto.string_val[0].decode()
    start = reader.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    hparams = messages.HParamsPluginData.FromString(start).session_start_info.hparams
    assert hparams["training.learning_rate"].number_value == config.training.learning_rate
    assert hparams["model.positions"].string_value == "learned"
    assert hparams["training.compile"].bool_value is False
    assert "training.muon_weight_decay" not in hparams


@pytest.mark.parametrize("killed", [5, 2])
def test_tensorboard_shows_no_step_twice_after_a_resume(killed: int) -> None:
    """With the newest checkpoint at step 3, and before the first one."""
    run = killed_at(killed, **BOARD | {"checkpoint_interval": 3, "eval_interval": None})
    assert [step for step, _ in board_curves(run)["train/loss"]] == [*range(1, killed)]
    assert resume(run).warnings == []
    assert len(list((run.path / "tensorboard").iterdir())) == 2
    assert [step for step, _ in board_curves(run)["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert board_curves(run) == expected(run)
    assert len(board(run).Tensors("config/text_summary")) == 1


# Weights & Biases

WANDB: dict[str, Any] = {"loggers": ["wandb"], "eval_interval": 3}
BLOCK, HEADER = 32 * 1024, 7
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package without the user's login or proxies, with its files in the test's folder; it leaves no process."""
    package = pytest.importorskip("wandb", reason="the package wandb is not installed")
    for name in [*filter(lambda name: name.startswith("WANDB_"), os.environ), *PROXIES, *map(str.upper, PROXIES)]:
        monkeypatch.delenv(name, raising=False)
    for folder in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{folder}_DIR", str(tmp_path / "wandb-home" / folder))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    package.teardown()
    yield package
    package.teardown()
    assert [name for name in children() if "wandb" in name] == []


def children() -> Iterator[str]:
    """The names of the processes that this one has started and that still run."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:  # it has just ended
            continue
        if fields["PPid"] == str(os.getpid()):
            yield fields["Name"]


def records(path: Path, kind: str) -> list[Any]:
    """The records of a kind in a `.wandb` file: LevelDB's log format, after a header as long as a chunk's."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, position, record, found = path.read_bytes(), HEADER, b"", []
    while position < len(data):
        room = BLOCK - position % BLOCK
        if room < HEADER:
            position += room
            continue
        _, length, part = struct.unpack_from("<IHB", data, position)
        record += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if part in (1, 4):  # a whole record, or the last part of one
            message = messages.Record.FromString(record)
            found += [getattr(message, kind)] if message.WhichOneof("record_type") == kind else []
            record = b""
    return found


def offline_files(wandb: Any, run: Run) -> list[Path]:
    wandb.teardown()  # as at the end of a process: W&B's own process flushes its files
    return sorted((run.path / "wandb").glob(f"offline-run-*-{run.id}/run-{run.id}.wandb"))


def wandb_curves(path: Path) -> Curves:
    found: Curves = {}
    for history in records(path, "history"):
        for item in history.item:
            tag = item.key or "/".join(item.nested_key)
            if "/" in tag:
                found.setdefault(tag, []).append((history.step.num, float(item.value_json)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"WANDB_MODE": "offline"}, "WANDB_MODE"),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "http://127.0.0.1:9"),
    ],
)
def test_wandb_offline_or_without_a_server_keeps_the_curves_and_the_config(
    wandb: Any, monkeypatch: pytest.MonkeyPatch, capfd, variables: dict[str, str], reason: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trained = train(short(**WANDB))
    run = trained.run
    (warning,) = trained.warnings
    assert reason in warning
    assert f"wandb sync {run.path}/wandb/offline-run-*-{run.id}" in warning
    (path,) = offline_files(wandb, run)
    assert wandb_curves(path) == expected(run)
    (header,) = records(path, "run")
    assert (header.run_id, header.display_name, header.project) == (run.id, run.name, "lumiere")
    (model,) = [item.value_json for item in header.config.update if item.key == "model"]
    assert '"context_size":16' in model.replace(" ", "")
    assert [record.exit_code for record in records(path, "exit")] == [0]
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_wandb_without_a_key_stays_offline_and_a_resume_continues(wandb: Any) -> None:
    run = killed_at(5, **WANDB)
    # W&B names its folders by the second, and both trainings may fall into one.
    (folder,) = [path.parent for path in offline_files(wandb, run)]
    folder.rename(folder.with_name(f"offline-run-20000101_000000-{run.id}"))
    (warning,) = resume(run).warnings
    assert "no API key" in warning
    first, second = offline_files(wandb, run)
    assert [step for step, _ in wandb_curves(first)["train/loss"]] == [1, 2, 3, 4]
    assert [record.exit_code for record in records(first, "exit")] == [1]
    assert wandb_curves(second) == expected(run, after=3)


@pytest.mark.slow
def test_a_malformed_key_counts_as_none(wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    wandb.setup(wandb.Settings(silent=True))
    assert not has_key()


@pytest.mark.slow
def test_wandb_disabled_writes_and_says_nothing(wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    trained = train(short(**WANDB))
    assert trained.warnings == offline_files(wandb, trained.run) == []


def test_a_server_is_reachable_if_it_listens_or_behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert is_reachable(address)
    assert not is_reachable(address)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert is_reachable(address)


# Trackio

TRACKIO: dict[str, Any] = {"loggers": ["trackio"], "eval_interval": 3}
SPEEDS = ("train/tokens_per_second", "train/mfu")
"""What a repeated step does not repeat."""


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where Trackio, which reads the variable when it is imported, keeps the databases of this module."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        pytest.importorskip("trackio", reason="the package trackio is not installed (make trackio)")
        yield folder


@pytest.fixture
def database(trackio_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The database of a project of this test, on a machine with a token, where nothing may use the network."""
    from huggingface_hub import constants

    connections: list[Any] = []

    def connect(*address: Any) -> None:
        connections.append(address)
        raise OSError("there is no network")

    for name in filter(lambda name: name.startswith("TRACKIO_"), os.environ):
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRACKIO_PROJECT", tmp_path.name)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    yield trackio_folder / f"{tmp_path.name}.db"
    assert connections == []


def trackio_curves(database: Path, run: Run) -> Curves:
    found: Curves = {}
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics where run_name = ? order by id", [run.name])
        for step, metrics in rows:
            for tag, value in json.loads(metrics).items():
                found.setdefault(tag, []).append((step, value))
    connection.close()
    return found


@pytest.mark.slow
def test_trackio_has_the_curves_and_the_config_and_connects_to_nothing(
    database: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    trained = train(short(**TRACKIO))
    run = trained.run
    assert trained.warnings == []
    assert trackio_curves(database, run) == expected(run)
    with sqlite3.connect(database) as connection:
        ((config,),) = connection.execute("select config from configs where run_name = ?", [run.name])
    connection.close()
    assert json.loads(config)["model"]["context_size"] == 16
    assert json.loads(config)["_Username"] is None
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    second = train(short(**TRACKIO))
    (warning,) = second.warnings
    assert "TRACKIO_SPACE_ID" in warning
    assert trackio_curves(database, second.run) == expected(second.run)
    assert os.environ["TRACKIO_SPACE_ID"] == "someone/space"
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [5, 2])
def test_trackio_shows_no_step_twice_after_a_resume(database: Path, killed: int) -> None:
    """With the newest checkpoint at step 3, and before the first one."""
    run = killed_at(killed, **TRACKIO | {"checkpoint_interval": 3, "eval_interval": None})
    assert [step for step, _ in trackio_curves(database, run)["train/loss"]] == [*range(1, killed)]
    assert resume(run).warnings == []
    assert [step for step, _ in trackio_curves(database, run)["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert {tag: points for tag, points in trackio_curves(database, run).items() if tag not in SPEEDS} == {
        tag: points for tag, points in expected(run).items() if tag not in SPEEDS
    }


@pytest.mark.slow
def test_training_goes_on_without_a_folder_for_trackio(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", Path("/proc/none"))
    trained = train(short(**TRACKIO))
    (warning,) = trained.warnings
    assert "/proc/none" in warning
    assert trained.run.record.status == "finished"
