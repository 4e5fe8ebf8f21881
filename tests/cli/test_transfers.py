"""`lumiere runs push` and `pull`, as they are typed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lumiere.persistence.runs import Run, RunStore
from tests.cli.commands import invoke, read_json, refuse


def test_a_pulled_run_is_used_like_any_other(run: Run) -> None:
    pushed = invoke("runs", "push", "latest", "away")
    assert pushed.stderr == ""
    assert run.name in pushed.stdout
    pulled = invoke("runs", "pull", "away", "--runs-dir", "other")
    assert pulled.stderr == ""
    assert run.name in pulled.stdout
    there, here = (read_json("eval", "latest", "--runs-dir", folder) for folder in ("other", "runs"))
    assert (there["loss"], there["accuracy"]) == (here["loss"], here["accuracy"])
    again = read_json("runs", "pull", "away", run.id, "--checkpoint", "best", "--runs-dir", "third")
    assert again["checkpoints"] == ["best"]
    assert RunStore("third").open(run.id).load_model("best").state_dict().keys() == run.load_model().state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["push", "pull"])
def test_ctrl_c_leaves_no_run_and_the_repeated_command_goes_on(run: Run, command: str) -> None:
    """In a process of its own, interrupted while a large file is on its way."""
    with run.tokenizer_path.open("ab") as file:
        file.truncate(400_000_000)
    folder, arguments = Path("away"), ["push", "latest", "away"]
    if command == "pull":
        invoke("runs", *arguments)
        folder, arguments = Path("other"), ["pull", "away", "--runs-dir", "other"]
    process = subprocess.Popen([sys.executable, "-m", "lumiere", "runs", *arguments], stderr=subprocess.PIPE, text=True)
    while not any(folder.rglob("*tokenizer.json*")):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stderr = process.communicate()[1]
    assert (process.returncode, stderr) == (130, "interrupted; run the command again to continue\n")
    assert RunStore("other").all() == []
    if command == "push":
        refuse("runs", "pull", "away", "--runs-dir", "other")
    again = read_json("runs", *arguments)
    assert again["run"] == run.name
    assert 0 < again["moved_files"] < again["num_files"]
