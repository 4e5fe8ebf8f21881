"""Any bytes in place of any file give a value or a `LumiereError`: the readers and the valid files are the fuzzer's."""

import contextlib
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from benchmarks.fuzz import TARGETS, run_input
from lumiere.errors import LumiereError

ROOT = Path(__file__).parents[1]
NAMES = sorted(TARGETS)
derandomized = settings(
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@cache
def seeds(name: str) -> list[bytes]:
    return TARGETS[name].seeds()


@pytest.mark.parametrize("name", NAMES)
def test_valid_files_are_accepted(name: str, tmp_path: Path) -> None:
    accepted = [run_input(TARGETS[name], tmp_path, data) for data in seeds(name)]
    # Of the configs some are overrides, and one checkpoint is of another model.
    assert accepted.count(False) == {"config": 4, "checkpoint": 1}.get(name, 0)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.binary(max_size=300))
@derandomized
def test_any_bytes(name: str, tmp_path: Path, data: bytes) -> None:
    run_input(TARGETS[name], tmp_path, data)


@pytest.mark.parametrize("name", NAMES)
@given(draw=st.randoms(use_true_random=False), count=st.integers(1, 3))
@derandomized
def test_any_change_of_a_value(name: str, tmp_path: Path, draw: random.Random, count: int) -> None:
    data = draw.choice([seed for seed in seeds(name) if fuzz.can_mutate(TARGETS[name], seed)])
    with contextlib.suppress(Exception):  # nothing may be left of the structure
        for _ in range(count):
            data = TARGETS[name].mutate(data, draw)
    run_input(TARGETS[name], tmp_path, data)


@pytest.mark.parametrize("name", NAMES)
@given(place=st.floats(0, 1), bits=st.integers(1, 255), insert=st.binary(max_size=3), cut=st.integers(0, 3))
@derandomized
def test_any_change_of_some_bytes(name: str, tmp_path: Path, place: float, bits: int, insert: bytes, cut: int) -> None:
    for seed in seeds(name):
        data = bytearray(seed or b"{}")
        index = round(place * (len(data) - 1))
        data[index] ^= bits
        data[index:index] = insert
        del data[index + len(insert) + 1 : index + len(insert) + 1 + cut]
        run_input(TARGETS[name], tmp_path, bytes(data))


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("config", b"model: {d_ff: 8, dropout: 0.5}\ndataset: {data_files: [b, 'c']}\ntraining:\n  seed: 1\n"),
        ("record", b'{"status": "failed", "step": 9, "best_loss": 1.5, "command": ["a", "b"], "error": "\\u001b"}'),
        ("metrics", None),
    ],
)
def test_a_small_file_cut_short_at_any_length_or_with_any_byte_changed(
    name: str, whole: bytes | None, tmp_path: Path
) -> None:
    whole = whole or seeds(name)[0]
    for index in range(len(whole)):
        changed = bytearray(whole)
        changed[index] ^= 1 << (index % 8)
        for data in (whole[:index], bytes(changed)):
            run_input(TARGETS[name], tmp_path, data)


def test_a_tokenizer_cut_short_at_any_length_is_refused(tmp_path: Path) -> None:
    [whole] = seeds("tokenizer")
    whole = whole.rstrip()
    assert not any(run_input(TARGETS["tokenizer"], tmp_path, whole[:length]) for length in range(0, len(whole), 7))


def test_a_resealed_checkpoint_with_a_changed_tensor_is_read_as_it_is(tmp_path: Path) -> None:
    """The hashes find damage, not malice: a file that was made with care is a checkpoint like any other."""
    target = TARGETS["checkpoint"]
    whole = seeds("checkpoint")[1]
    draws = (random.Random(seed) for seed in range(60))
    outcomes = {run_input(target, tmp_path, target.mutate(whole, draw)) for draw in draws}
    assert outcomes == {True, False}


def test_the_fuzzer_lets_nothing_but_our_errors_pass(tmp_path: Path) -> None:
    def outcome(error: BaseException) -> bool:
        def read(folder: Path) -> None:
            raise error

        return run_input(fuzz.Target(lambda data: "file", read, list, lambda data, draw: data), tmp_path, b"")

    assert not outcome(LumiereError("bad file"))
    with pytest.raises(KeyError):
        outcome(KeyError("step"))
    steering = LumiereError("a")
    steering.message = "\x1b[31m"
    with pytest.raises(AssertionError):
        outcome(steering)


def test_without_atheris_the_fuzzer_says_what_to_install() -> None:
    script = (
        "import sys, runpy\n"
        "sys.modules['atheris'] = None\n"
        "sys.argv = sys.argv[:1]\n"
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'fuzz.py')!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "atheris is not installed: pip install -e '.[fuzz]' (Linux only)\n"
