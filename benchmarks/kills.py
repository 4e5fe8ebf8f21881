"""Test that a training run survives kills at any moment: `python benchmarks/kills.py --kills 100`.

Trains a tiny model without interruption, then trains it repeatedly in a process that is ended with SIGKILL, at random
moments and inside every stage of writing a file, where the write is held open until the kill arrives. After every
kill, `lumiere runs ls` must work, every checkpoint must load, and unfinished files must not pile up; then the run is
resumed, to be killed again. When it finishes, its weights must equal those of the uninterrupted run bit for bit, and
its metrics must contain every step once.

Processes are forks of this one, which has loaded torch already: a kill then takes one second instead of five.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork

CONFIG = """
model: {embedding_size: 16, context_size: 16, num_layers: 1, num_heads: 2, d_key: 8, d_value: 8, d_ff: 32, dropout: 0.1}
tokenizer: {vocab_size: 320}
dataset: {name: stories, num_documents: 4, validation_fraction: 0.25, sliding_window_size: 4}
training: {batch_size: 8, max_steps: 60, learning_rate: 0.01, warmup_steps: 4, eval_interval: 7, log_interval: 1,
           checkpoint_interval: 3, ema_decay: 0.9, device: cpu, precision: float32}
"""
NUM_STEPS = 60
STAGES = ("tensors", "write", "half", "written", "fsync", "fsynced", "replace", "replaced", "unlink")
MOST_LEFTOVERS = 3  # per killed process: a checkpoint, a removed one, a record
HELD = b"h"


class LostError(Exception):
    """A guarantee was broken."""


# --- the killed process -----------------------------------------------------------------------------------------------


def in_child(act: Callable[[], int], hold_at: tuple[str, int] | None = None) -> tuple[int, int]:
    """Fork and run `act` in the child; return its id and a pipe that receives `HELD` when it holds a write open."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        errors = os.open("errors.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(errors, 2)
        if hold_at is not None:
            hold(*hold_at, writing)
        code = act()
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    os._exit(code)


def hold(stage: str, number: int, pipe: int) -> None:
    """Suspend this process when it reaches a stage of writing a file for the `number`-th time."""
    from lumiere.files import Disk

    left = number

    def come_to(name: str) -> None:
        nonlocal left
        if name == stage:
            left -= 1
            if left == 0:
                os.write(pipe, HELD)
                time.sleep(3600)

    def around(function: Callable[..., Any], before: str, after: str = "") -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            come_to(before)
            result = function(*arguments, **options)
            come_to(after)
            return result

        return call

    @contextlib.contextmanager
    def new_file_slowly(self: Disk, path: Path) -> Iterator[BinaryIO]:
        come_to("write")
        with new_file(self, path) as file:
            yield file
            file.flush()
            data = path.read_bytes()
            file.truncate(len(data) // 2)
            come_to("half")
            file.seek(len(data) // 2)
            file.write(data[len(data) // 2 :])
            file.flush()
            come_to("written")

    def write_slowly(self: Disk, path: Path, tensors: Any, metadata: Any) -> None:
        # Safetensors writes beside the path, then renames: a kill leaves a part of a file there.
        part = path.with_name(".tmp0a1b2c")
        part.write_bytes(b"half")
        come_to("tensors")
        part.unlink()
        write_tensors(self, path, tensors, metadata)

    new_file, Disk.new_file = Disk.new_file, new_file_slowly
    write_tensors, Disk.write_tensors = Disk.write_tensors, write_slowly
    Disk.fsync = around(Disk.fsync, "fsync", "fsynced")
    Disk.rename = around(Disk.rename, "replace", "replaced")
    os.unlink = around(os.unlink, "unlink")


def lumiere(*arguments: str) -> Callable[[], int]:
    """Run the command like its entry point."""

    def run() -> int:
        from lumiere.cli import app

        sys.argv = ["lumiere", *arguments]
        app(prog_name="lumiere")
        return 0

    return run


# --- checks -----------------------------------------------------------------------------------------------------------


def ended(child: int, pipe: int) -> int:
    """Wait for the child to exit; return its exit code."""
    os.close(pipe)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def succeed(*arguments: str) -> None:
    """Run a command in a separate process, which must succeed."""
    code = ended(*in_child(lumiere(*arguments)))
    if code != 0:
        raise LostError(f"lumiere {' '.join(arguments)} left with {code}: {Path('errors.txt').read_text()[-2000:]}")


def outcome(run: Any) -> dict[str, Any]:
    """Return the parts of a finished run that depend only on its config."""
    from lumiere.persistence.checkpoint_manager import CheckpointManager
    from lumiere.persistence.tensor_files import hash_tensors

    manager = CheckpointManager(run.path.parent)
    lines = [json.loads(line) for line in run.metrics_path.read_text(encoding="utf-8").splitlines()]
    clock = ("time", "tokens_per_second", "mfu")
    return {
        "tensors": {
            name: hash_tensors(manager.load(run, name).tensors()) for name in manager.names(run) if name != "previous"
        },
        "metrics": [{key: value for key, value in line.items() if key not in clock} for line in lines],
    }


def check_after_a_kill(run: Any) -> None:
    """Check what must hold right after a kill, before anything is repaired."""
    from lumiere.persistence.checkpoint_manager import CheckpointManager

    manager = CheckpointManager(run.path.parent)
    for name in manager.names(run):
        manager.load(run, name)
    leftovers = list(run.path.rglob(".*.tmp"))
    if len(leftovers) > MOST_LEFTOVERS:
        raise LostError(f"unfinished files pile up: {', '.join(map(str, leftovers))}")
    if run.status not in ("crashed", "unknown", "finished"):
        raise LostError(f"killed, and its status is {run.status}")
    succeed("runs", "ls", "--runs-dir", str(run.path.parent))


# --- killing ----------------------------------------------------------------------------------------------------------


def kill_one(arguments: list[str], hold_at: tuple[str, int] | None, seconds: float) -> bool:
    """Start the command and kill it in the held stage or after a delay; return whether it was still running."""
    import select

    child, pipe = in_child(lumiere(*arguments), hold_at)
    select.select([pipe], [], [], 60 if hold_at else seconds)  # an exiting child closes the pipe, which wakes us too
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return ended(child, pipe) == -signal.SIGKILL


def moments(generator: random.Random, whole_seconds: float) -> Iterator[tuple[tuple[str, int] | None, float]]:
    """Yield kill moments forever: each stage of writing in turn, at a random occurrence, then a random moment."""
    while True:
        for stage in STAGES:
            yield (stage, generator.randint(1, 12)), 0.0
            yield None, generator.uniform(0, whole_seconds)


def survive(num_kills: int, seed: int, tell: Callable[[str], None]) -> dict[str, int]:
    """Kill training runs this many times, in the current folder, which must be empty.

    Returns:
        The number of kills by moment, and the number of finished runs.

    Raises:
        LostError: anything was lost.
    """
    # Load what the children need once; torch loads its compiler with its optimizers.
    import torch
    import torch._dynamo

    from lumiere.persistence.runs import RunStore

    torch.set_num_threads(1)
    Path("config.yaml").write_text(CONFIG, encoding="utf-8")
    os.environ["LUMIERE_CACHE_DIR"] = str(Path("cache").absolute())
    succeed("train", "config.yaml", "--runs-dir", "whole")  # fills the corpus cache
    start = time.perf_counter()
    succeed("train", "config.yaml", "--runs-dir", "whole")
    whole_seconds = time.perf_counter() - start
    expected = outcome(RunStore("whole").all()[0])
    if [line["step"] for line in expected["metrics"] if "loss" in line] != list(range(1, NUM_STEPS + 1)):
        raise LostError("the undisturbed run is none to compare with")

    store = RunStore("killed")
    counts = dict.fromkeys([*STAGES, "random", "finished"], 0)
    run = None
    plan = moments(random.Random(seed), whole_seconds)
    while sum(counts.values()) - counts["finished"] < num_kills:
        hold_at, seconds = next(plan)
        before = {known.name for known in store.all()}
        arguments = ["train", "--resume", run.id] if run else ["train", "config.yaml"]
        was_killed = kill_one([*arguments, "--runs-dir", "killed"], hold_at, seconds)
        made = [new for new in store.all() if new.name not in before]
        run = run or (made[0] if made else None)
        if was_killed:
            counts[hold_at[0] if hold_at else "random"] += 1
            if run is None:
                continue  # before the run existed
            check_after_a_kill(run)
            tell(f"killed {'in ' + hold_at[0] if hold_at else f'after {seconds:.2f} s'}: {run.id} is {run.status}")
            if not run.config_path.exists():
                run = None  # while the run was created: nothing was trained or can be resumed
        elif run and run.status == "finished":
            counts["finished"] += check_the_end(run, expected)
            run = None
        else:
            raise LostError(f"it ended by itself: {Path('errors.txt').read_text()[-2000:]}")
    if run:
        succeed("train", "--resume", run.id, "--runs-dir", "killed")
        counts["finished"] += check_the_end(run, expected)
    return counts


def check_the_end(run: Any, expected: dict[str, Any]) -> int:
    found = outcome(run)
    if found != expected:
        names = [name for name, value in expected["tensors"].items() if found["tensors"].get(name) != value]
        raise LostError(f"{run.path} is not what it would have been; other tensors: {', '.join(names) or 'none'}")
    if leftovers := list(run.path.rglob(".*.tmp")):
        raise LostError(f"unfinished files stay: {', '.join(map(str, leftovers))}")
    return 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        start = time.perf_counter()
        counts = survive(arguments.kills, arguments.seed, lambda line: print(line, file=sys.stderr))
        os.chdir("/")
    finished = counts.pop("finished")
    places = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{sum(counts.values())} kills ({places}), {finished} runs at their end with the same bits, nothing lost")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
