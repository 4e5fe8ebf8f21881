"""Commands as they are printed: a shell must find the programs of this environment, and of no other."""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lumiere.programs import install_command, program

SCRIPTS = sysconfig.get_path("scripts")


@pytest.mark.parametrize(
    ("path", "folder"),
    [(SCRIPTS, "."), (os.defpath, "."), (os.defpath, SCRIPTS), (os.defpath, sysconfig.get_path("data"))],
)
def test_a_shell_finds_the_program_of_this_environment(path: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", path)
    monkeypatch.chdir(folder)
    found = subprocess.run(
        ["/bin/sh", "-c", f"command -v {program('pip')}"], capture_output=True, text=True, check=True
    )
    assert os.path.samefile(found.stdout.strip(), Path(SCRIPTS) / "pip")


def test_a_program_of_the_same_name_elsewhere_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other folder"
    other.mkdir()
    (other / "pip").write_text("#!/bin/sh\n")
    (other / "pip").chmod(0o755)
    monkeypatch.setenv("PATH", str(other))
    assert os.path.samefile(shlex.split(program("pip"))[0], Path(SCRIPTS) / "pip")


def test_without_a_script_the_module_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "nowhere")
    assert shlex.split(program("lumiere")) == [sys.executable, "-m", "lumiere"]


def test_requirements_are_quoted_for_a_shell() -> None:
    assert shlex.split(install_command("a>=1,<2", "b"))[-3:] == ["install", "a>=1,<2", "b"]
