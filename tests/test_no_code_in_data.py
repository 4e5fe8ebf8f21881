"""Data is never code: nothing that Lumiere reads is unpickled, evaluated, or built by a YAML tag."""

import ast
import contextlib
import os
import pickle
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import datasets
import pytest
import torch
from datasets.packaged_modules import _EXTENSION_TO_MODULE, _PACKAGED_DATASETS_MODULES

from lumiere.config.loader import UniqueKeyLoader, dump_config, load_config_file
from lumiere.config.schema import DatasetConfig
from lumiere.data import hub
from lumiere.data.corpus import find_source, load_rows
from lumiere.errors import CheckpointError, ConfigError, DataError
from lumiere.persistence.checkpoint import load_checkpoint, read_metadata
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run, RunStore
from tests.checkpoints import folder_of, plant
from tests.cli.commands import invoke, refuse

PACKAGE = Path(__file__).parents[1] / "lumiere"
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNNING = {"eval", "exec", "compile", "__import__"}
UNSAFE_LOADING = {"unsafe_load", "full_load", "load_all", "unsafe_load_all", "full_load_all"}


def dangers(source: str) -> list[str]:
    """What in `source` would let data run as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in UNPICKLING]
        if not isinstance(node, ast.Call):
            continue
        called, arguments = ast.unparse(node.func), [ast.unparse(argument) for argument in node.args]
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        owner, _, name = called.rpartition(".")
        if (
            called in RUNNING
            or called == "torch.load"
            or name in UNSAFE_LOADING
            or (owner == "yaml" and name == "load" and "UniqueKeyLoader" not in [*arguments, *keywords.values()])
            or keywords.get("allow_pickle", "False") != "False"
            or keywords.get("trust_remote_code", "False") != "False"
            or keywords.get("shell", "False") != "False"
        ):
            found.append(called)
    return found


DANGEROUS = """
import pickle
from dill import loads
torch.load(path)
torch.load(path, weights_only=True)
np.load(path, allow_pickle=True)
yaml.load(text)
yaml.load(text, yaml.Loader)
yaml.unsafe_load(text)
eval(text)
exec(text)
subprocess.run(text, shell=True)
datasets.load_dataset(name, trust_remote_code=True)
"""


def test_the_search_finds_what_it_looks_for() -> None:
    assert [line for line in DANGEROUS.strip().splitlines() if not dangers(line)] == []


def test_no_file_of_the_package_runs_data() -> None:
    found = {path.name: dangers(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    assert {name: own for name, own in found.items() if own} == {}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.fixture
def run(trained_run: Run, tmp_path: Path) -> Run:
    """A copy of the trained run, alone in `runs`."""
    shutil.copytree(trained_run.path, tmp_path / "runs" / trained_run.name)
    return RunStore(tmp_path / "runs").open("latest")


def change_dataset(run: Run, settings: Mapping[str, object]) -> None:
    config = run.load_config()
    dataset = config.dataset.model_copy(update=settings)
    run.config_path.write_text(dump_config(config.model_copy(update={"dataset": dataset})), encoding="utf-8")


def test_the_payload_of_a_pickle_never_runs(run: Run, tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    planted = pickle.dumps(Payload(fired))
    pickle.loads(planted).close()  # that it would
    assert fired.exists()
    fired.unlink()
    torch.save({"model": Payload(fired)}, tmp_path / "zipped")
    for content in (planted, (tmp_path / "zipped").read_bytes()):
        old = tmp_path / "best.safetensors"  # a file of format 1
        old.write_bytes(content)
        best = folder_of(run, "best")
        plant(best, "model.safetensors", content)
        for path in (old, best):
            with pytest.raises(CheckpointError, match="is damaged"):
                load_checkpoint(path)
        with pytest.raises(CheckpointError, match="is damaged"):
            read_metadata(old)
        with pytest.raises(CheckpointError, match="is damaged"):
            run.load_model()
        run.tokenizer_path.write_bytes(content)
        with pytest.raises(DataError):
            run.load_tokenizer()
        run.record_path.write_bytes(content)
        assert run.record == RunRecord()
        refuse("generate")
    for name in ("evil.pkl", "data/train.pkl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(planted)
    for settings in (
        {"name": "pandas", "data_files": str(tmp_path / "evil.pkl")},
        {"name": str(tmp_path / "data")},
        {"name": str(tmp_path / "data"), "data_files": "*.pkl"},
    ):
        change_dataset(run, settings)
        refuse("eval", str(run.path))
    assert not fired.exists()


@pytest.mark.parametrize("address", ["https://127.0.0.1:9/a.csv", "hf://datasets/a/b/c.csv", "s3://bucket/a.csv"])
def test_a_copied_run_opens_no_address(run: Run, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    Path("data").mkdir()
    readme = f"---\nconfigs: [{{config_name: default, data_files: '{address}'}}]\n---\n"
    Path("data/README.md").write_text(readme)
    for name in ("csv", "text", os.path.abspath("data")):
        change_dataset(run, {"name": name, "data_files": address})
        refuse("eval", str(run.path))


def test_listing_opens_no_data(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text\na\n")
    change_dataset(run, {"name": "csv", "data_files": str(data)})
    opened: list[str] = []
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    for command in (["ls"], ["show", run.id], ["card", run.id]):
        invoke("runs", *command, "--runs-dir", str(tmp_path / "runs"))
    assert str(run.config_path) in opened
    assert str(data) not in opened


@pytest.mark.parametrize("name", sorted({*_PACKAGED_DATASETS_MODULES, "cache"}))
def test_only_builders_of_plain_data_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By their name, by the ending of a folder's files, and by what `datasets` makes of a folder with a README."""
    ran: list[str] = []
    for method in ("download_and_prepare", "as_dataset", "as_streaming_dataset"):
        monkeypatch.setattr(
            datasets.DatasetBuilder, method, lambda builder, *_, **__: ran.append(type(builder).__name__)
        )
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    settings: list[dict[str, object]] = [{"name": name, "data_files": "a.bin"}]
    (tmp_path / "a.bin").touch()
    for number, ending in enumerate(ending for ending, (module, _) in _EXTENSION_TO_MODULE.items() if module == name):
        for readme in (False, True):
            folder = tmp_path / f"{number}{readme}"
            folder.mkdir()
            (folder / f"train{ending}").touch()
            if readme:
                text = f"---\nconfigs: [{{config_name: default, data_files: 'train{ending}'}}]\n---\n"
                (folder / "README.md").write_text(text)
            settings.append({"name": str(folder)})
    allowed = name in ("text", "json", "csv", "parquet", "arrow")
    for setting in settings:
        config = DatasetConfig.model_validate(setting)
        if allowed:
            with contextlib.suppress(DataError):  # the files are empty
                load_rows(config)
        elif os.path.isdir(config.name) and ending_is_ours(config.name):
            assert find_source(config).builder == "text"  # .md, which `datasets` takes for tasks of agents
        else:
            with pytest.raises(DataError):
                load_rows(config)
    assert not ran


def ending_is_ours(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, "train.md")) and not os.path.exists(os.path.join(folder, "README.md"))


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir [fired]", "object/new:os.mkdir [fired]", "name:os.mkdir",
                                 "module:antigravity"])  # fmt: skip
def test_a_yaml_tag_makes_no_object(tmp_path: Path, tag: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"model: !!python/{tag}")
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        load_config_file(path)
    assert not (tmp_path / "fired").exists()
    assert UniqueKeyLoader.yaml_multi_constructors == {}
