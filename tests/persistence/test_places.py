"""Places by URL: a real S3-compatible server, credentials that never show, servers that are not there."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lumiere.errors import LumiereError
from lumiere.persistence import places
from lumiere.persistence.places import Folder, masked, open_place
from lumiere.persistence.runs import RunStore
from lumiere.persistence.transfer import pull, push
from tests.persistence.hub_server import hub_server
from tests.persistence.test_transfer import contents, interrupt, make

SECRETS = ("hunter22", "AKIAEXAMPLE", "secret/key", "secret", "key+x", "key%2Bx")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("runs", "runs"),
        ("s3://bucket/runs", "s3://bucket/runs"),
        ("hf://user/repo@main/runs", "hf://user/repo@main/runs"),
        ("sftp://me:hunter22@host/runs", "sftp://***@host/runs"),
        ("sftp://me@host:22/runs", "sftp://***@host:22/runs"),
        ("s3://AKIAEXAMPLE:secret/key@bucket/runs", "s3://***@bucket/runs"),
        ("s3://AKIAEXAMPLE:key%2Bx@bucket/runs", "s3://***@bucket/runs"),
        ("https://host/runs?token=hunter22&x=secret", "https://host/runs?***"),
        ("simplecache::sftp://me:hunter22@host/runs", "simplecache::sftp://***@host/runs"),
        ("a?b@c:d", "a?b@c:d"),
    ],
)
def test_credentials_are_masked(url: str, shown: str) -> None:
    assert masked(url) == shown
    assert not any(secret in shown for secret in SECRETS)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAEXAMPLE:secret/key@bucket/runs",
        "s3://AKIAEXAMPLE:key%2Bx@bucket/runs",
        "s3://bucket/runs?token=hunter22",
        "hf://user/repo?token=hunter22",
        "sftp://me:hunter22@127.0.0.1:9/runs",
        "xyz://me:hunter22@host/runs",
        "ftp://me:hunter22@127.0.0.1:9/runs",
    ],
)
def test_no_message_shows_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter22")
    with pytest.raises(LumiereError) as caught:
        pull(RunStore(tmp_path / "other"), url)
    shown = f"{caught.value.message} {caught.value.hint}"
    assert "***" in shown or "needs the package" in shown
    assert not any(secret in shown.replace("AWS_SECRET", "") for secret in SECRETS)
    assert caught.value.__cause__ is None
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("url", ["", "/", " ", "a\0b", "s3:bucket/runs", "hf:user/repo", "xyz://bucket/runs"])
def test_what_is_no_place(url: str) -> None:
    with pytest.raises(LumiereError):
        open_place(url)


def test_paths_are_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for url, path in {
        "runs": Path("runs"),
        "~/runs": tmp_path / "runs",
        "file:///a/b": Path("/a/b"),
        "a:b": Path("a:b"),
        "run 1?": Path("run 1?"),
    }.items():
        place = open_place(url)
        assert isinstance(place, Folder)
        assert place.path == path


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(url: str, **options: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(LumiereError) as caught:
        open_place("s3://bucket/runs")
    assert caught.value.hint == "pip install s3fs"


def test_a_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts connections and says nothing, as a firewall may."""
    import threading

    import fsspec

    class Silent:
        def ls(self, path: str, detail: bool) -> list[str]:
            threading.Event().wait(60)
            return []

    monkeypatch.setattr(fsspec, "url_to_fs", lambda url, **options: (Silent(), "bucket"))
    monkeypatch.setattr(places, "ANSWER_SECONDS", 0.05)
    with pytest.raises(LumiereError, match="no answer"):
        pull(RunStore(tmp_path / "other"), "s3://bucket")


# The Hugging Face Hub


@pytest.mark.slow
def test_a_run_travels_through_the_hub(tmp_path: Path) -> None:
    """In processes of their own, because `huggingface_hub` reads its address once."""
    run, files = make(RunStore(tmp_path / "runs")), {"README.md": b"kept"}
    with hub_server(files) as address:
        variables = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", "NO_PROXY": "*"}

        def lumiere(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "lumiere", "runs", *arguments]
            return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)

        for is_first in (True, False):
            pushed = lumiere("push", run.id, "hf://user/repo/some/runs", "--checkpoint", "0", "--json")
            assert (pushed.returncode, pushed.stderr) == (0, "")
            assert (json.loads(pushed.stdout)["moved_files"] > 0) == is_first
        pulled = lumiere("pull", "hf://user/repo/some/runs", "--runs-dir", "other")
        assert (pulled.returncode, pulled.stderr) == (0, "")
        there = contents(RunStore("other").open(run.id).path)
        assert there.items() <= contents(run.path).items()
        assert {name for name in there if "checkpoints/snapshots/step-00000000/" in name}
        names = {f"some/runs/{run.name}/{name}" for name in (*there, "transfer.json")}
        assert files.keys() == names | {"README.md"}
        refused = lumiere("pull", "hf://user/none", "--runs-dir", "other")
        assert refused.returncode == 2
        assert [line.split(":")[0] for line in refused.stderr.splitlines()] == ["error", "hint"]


# S3


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URL of a bucket on a server of this process."""
    pytest.importorskip("s3fs", reason="the package s3fs is not installed")
    server_class = pytest.importorskip("moto.server", reason="the package moto is not installed").ThreadedMotoServer
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_class(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{tmp_path.name.replace('_', '-')[:40]}"  # all servers of a process have the same buckets
    objects().mkdir(bucket)
    yield f"s3://{bucket}/some/runs"
    server.stop()


def objects() -> Any:
    """The server's objects, seen by s3fs itself."""
    import fsspec

    return fsspec.filesystem("s3", skip_instance_cache=True)


@pytest.mark.slow
def test_a_run_travels_through_s3(s3: str, tmp_path: Path) -> None:
    store, other = RunStore(tmp_path / "runs"), RunStore(tmp_path / "other")
    run = make(store)
    # More than one part of an upload.
    run.tokenizer_path.write_bytes(os.urandom(60_000_000))
    with pytest.raises(KeyboardInterrupt):
        push(run, s3, report=interrupt("sending", 30))
    with pytest.raises(LumiereError):
        pull(other, s3, run.id)
    assert not other.runs_dir.exists()
    pushed = push(run, s3)
    assert 0 < pushed.moved_files < pushed.num_files
    assert push(run, s3).moved_files == 0
    with pytest.raises(KeyboardInterrupt):
        pull(other, s3, report=interrupt("fetching", 30))
    assert other.all() == []
    pulled = pull(other, s3)
    assert 0 < pulled.moved_files < pulled.num_files
    assert contents(other.open(run.id).path) == contents(run.path)
    assert pull(other, f"{s3}/{run.name}").moved_files == 0
    # It is the same layout as here, without a trace of the credentials.
    folder = f"{s3.removeprefix('s3://')}/{run.name}/"
    assert {path.removeprefix(folder) for path in objects().find(s3)} == {*contents(run.path), "transfer.json"}
    assert b"secret" not in objects().cat_file(f"{folder}transfer.json")


@pytest.mark.slow
def test_damage_and_absence_on_s3(s3: str, tmp_path: Path) -> None:
    store, other = RunStore(tmp_path / "runs"), RunStore(tmp_path / "other")
    run = make(store)
    with pytest.raises(LumiereError, match="bucket does not exist"):
        push(run, "s3://another-bucket/runs")
    assert not objects().exists("another-bucket")
    push(run, s3)
    bucket, path = objects(), f"{s3}/{run.name}/tokenizer.json"
    size = bucket.size(path)
    for data in (b"x" * size, b"x" * (size + 1), b""):
        bucket.pipe_file(path, data)
        with pytest.raises(LumiereError, match=r"tokenizer\.json"):
            pull(other, s3)
        assert other.all() == list(other.runs_dir.glob(".pulling.*")) == []
    bucket.rm_file(path)
    with pytest.raises(LumiereError, match="is missing"):
        pull(other, s3)
    push(run, s3)
    pull(other, s3)
    assert contents(other.open(run.id).path) == contents(run.path)
