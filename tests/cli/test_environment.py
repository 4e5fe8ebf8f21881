"""Environment variables that are set before a command runs: where caches go, and how OpenMP's threads wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lumiere.cli import SPIN_COUNT, move_caches, sleep_while_waiting
from lumiere.config.schema import RunConfig

OTHERS = ("HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")


@pytest.mark.parametrize(
    ("variables", "moved"),
    [
        ({"LUMIERE_CACHE_DIR": "ours"}, {"HF_HOME": "ours/huggingface", "MPLCONFIGDIR": "ours/matplotlib"}),
        (
            {"LUMIERE_CACHE_DIR": "ours", "HF_HOME": "mine", "MPLCONFIGDIR": "my"},
            {"HF_HOME": "mine", "MPLCONFIGDIR": "my"},
        ),
        ({"LUMIERE_CACHE_DIR": "ours", "XDG_CACHE_HOME": "."}, {"MPLCONFIGDIR": "ours/matplotlib"}),
        ({"LUMIERE_CACHE_DIR": "ours", "HOME": "a-folder"}, {}),
        ({}, {}),
    ],
)
def test_caches_move_where_their_own_place_cannot_be_written(
    variables: dict[str, str], moved: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a-file").touch()
    Path("a-folder").mkdir()
    variables = {name: str(tmp_path / value) for name, value in ({"HOME": "a-file"} | variables).items()}
    monkeypatch.setattr(os, "environ", dict(variables))
    move_caches()
    found = {name: os.environ[name] for name in OTHERS if name in os.environ and name != "XDG_CACHE_HOME"}
    assert found == {name: str(tmp_path / value) for name, value in moved.items()}
    assert os.listdir("a-folder") == []


@pytest.mark.slow
@pytest.mark.parametrize("home", ["a-file", "/proc/nobody"])
def test_a_corpus_of_files_without_a_home(tiny_config: RunConfig, home: str) -> None:
    Path("a-file").touch()
    Path("corpus").mkdir()
    # A folder that `datasets` resolves, and so needs its cache.
    Path("corpus/README.md").write_text("---\nconfigs: [{config_name: default, data_files: a.csv}]\n---\n")
    Path("corpus/a.csv").write_text("text\n" + "".join(f"The cat sat on the mat {i}.\n" for i in range(60)))
    values = tiny_config.model_dump()
    values["dataset"] |= {"name": "corpus", "num_documents": None}
    Path("c.yaml").write_text(yaml.safe_dump(values))

    def tokenize(**variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name not in (*OTHERS, "LUMIERE_CACHE_DIR")}
        command = [sys.executable, "-m", "lumiere", "tokenize", "c.yaml"]
        variables = kept | {"HOME": os.path.abspath(home)} | variables
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)

    refused = tokenize()
    assert refused.returncode == 2
    assert f"{os.path.abspath(home)}/.cache/huggingface" in refused.stderr
    assert "LUMIERE_CACHE_DIR" in refused.stderr
    assert tokenize(LUMIERE_CACHE_DIR="ours").returncode == 0
    assert Path("ours/huggingface").is_dir()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, str(SPIN_COUNT)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_the_users_choice_wins(chosen: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(chosen))
    sleep_while_waiting()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
