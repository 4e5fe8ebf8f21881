"""SIGKILL to real processes, at random moments and in every stage of a write; `benchmarks/kills.py` does the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "kills.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_twenty_kills_lose_nothing() -> None:
    result = subprocess.run([sys.executable, str(PROGRAM), "--kills", "20"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("20 kills ("), result.stdout
    assert "nothing lost" in result.stdout


BREAK = """
import runpy, sys
sys.path.insert(0, {root!r})
{how}
sys.argv = ["kills.py", "--kills", "20"]
runpy.run_path({program!r}, run_name="__main__")
"""
# Each of them as somebody might write it without thinking.
BROKEN = {
    "pointers first": """
from lumiere.persistence import checkpoint_manager, step_folders
write_checkpoint = checkpoint_manager.write_checkpoint
def point_first(folder, checkpoint, *rest):
    if folder.parent.name == "checkpoints":
        step_folders.point(folder.parent, ["latest"], step_folders.snapshot_name(checkpoint.step))
    write_checkpoint(folder, checkpoint, *rest)
checkpoint_manager.write_checkpoint = point_first
""",
    "no random state": """
import torch
torch.set_rng_state = lambda state: None
""",
    "other order": """
from lumiere.training import trainer
drawn = trainer.batch_at
begun = []
def batch_at(step, *rest):
    begun.append(step)
    return drawn(step - begun[0], *rest)
trainer.batch_at = batch_at
""",
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
@pytest.mark.parametrize("how", BROKEN)
def test_what_is_broken_on_purpose_is_found(how: str) -> None:
    root = str(PROGRAM.parents[1])
    program = BREAK.format(root=root, how=BROKEN[how], program=str(PROGRAM))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1, result.stdout
    assert "no checkpoint" in result.stderr or "is not what it would have been" in result.stderr, result.stderr
