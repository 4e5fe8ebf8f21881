"""Data is never code: nothing that Lumiere reads is unpickled, evaluated, or built by a YAML tag."""

import ast
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lumiere.cli import app
from lumiere.config.loader import UniqueKeyLoader, load_config_file
from lumiere.errors import CheckpointError, ConfigError, DataError
from lumiere.persistence.checkpoint import load_checkpoint, read_metadata
from lumiere.persistence.runs import Run, RunStore

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


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(text, shell=True)",
        "datasets.load_dataset(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_of_the_package_runs_data(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_the_payload_of_a_pickle_never_runs(trained_run: Run, tmp_path: Path) -> None:
    folder, fired = tmp_path / "runs" / trained_run.name, tmp_path / "fired"
    shutil.copytree(trained_run.path, folder)
    planted = pickle.dumps(Payload(fired))
    pickle.loads(planted).close()  # that it would
    assert fired.exists()
    fired.unlink()
    torch.save({"model": Payload(fired)}, tmp_path / "zipped")
    run = RunStore(tmp_path / "runs").open("latest")
    for content in (planted, (tmp_path / "zipped").read_bytes()):
        path = folder / "checkpoints" / "best.safetensors"
        path.write_bytes(content)
        for read in (load_checkpoint, read_metadata, lambda path: run.load_model()):
            with pytest.raises(CheckpointError, match="is damaged"):
                read(path)
        (folder / "tokenizer.json").write_bytes(content)
        with pytest.raises(DataError):
            run.load_tokenizer()
        (folder / "run.json").write_bytes(content)
        assert run.record == {"status": "unknown"}
        assert CliRunner().invoke(app, ["generate", "--runs-dir", str(tmp_path / "runs")]).exit_code == 2
    assert not fired.exists()


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.mkdir [fired]",
        "model: !!python/object/new:os.mkdir [fired]",
        "model: !!python/name:os.mkdir",
        "model: !!python/module:antigravity",
    ],
)
def test_a_yaml_tag_makes_no_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        load_config_file(path)
    assert not (tmp_path / "fired").exists()
    assert UniqueKeyLoader.yaml_multi_constructors == {}
