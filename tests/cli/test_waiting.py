"""How OpenMP's threads wait: set before torch reads it, and only where the user has not chosen."""

import os
import subprocess
import sys

import pytest

from lumiere.cli import SPIN_COUNT, sleep_while_waiting


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, str(SPIN_COUNT)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_the_users_choice_wins(chosen: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(chosen))
    sleep_while_waiting()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_it_comes_before_torch_is_loaded() -> None:
    code = "import sys, lumiere.cli; lumiere.cli.sleep_while_waiting(); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown == "False\n"
