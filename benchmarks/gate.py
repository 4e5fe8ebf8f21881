"""Compare this checkout with a reference commit, bit for bit: `python benchmarks/gate.py [--quick] [COMMIT]`.

For a change that must not change a number. Both versions train the same runs, which are interrupted at step 30, resumed
and finished at step 60, and then generate text and run every analysis. These must be equal:

- each line of the metrics (loss and gradient norm after every step), without the times;
- all parameters and optimizer states after every step, on every rank;
- all tensors of the last checkpoint and of the snapshots, compared by name;
- the output of `generate --seed 1` and of every `inspect ... --json`, byte for byte.

`--tolerance 1e-5` is for a change of the arithmetic in generation and inspection: numbers in their outputs may differ
by that much, absolute plus relative. The reference commit stands in `gate_reference.txt`; a commit that moves it says
which numbers changed, and why. Exits with 1 and lists the differences if there are any.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).with_name("gate_reference.txt")
TIMED = {"time", "tokens_per_second", "mfu"}
PROMPT = "The fox said to the"


@dataclass(frozen=True)
class Case:
    """A training that both versions run.

    Attributes:
        inspected: whether the model also generates text and is inspected.
    """

    name: str
    config: str
    settings: tuple[str, ...] = ()
    processes: int = 1
    inspected: bool = False


CORPUS = ("dataset.num_documents=300",)
SMALL = (
    "dataset.name=stories", "dataset.subset=null", "dataset.document_start=null", *CORPUS,
    "model.dropout=0.1", "training.gradient_accumulation_steps=2", "tokenizer.vocab_size=1024",
)  # fmt: skip
CASES = [
    Case("tiny-float32", "tiny", (*CORPUS, "training.precision=float32"), inspected=True),
    Case("tiny-bfloat16", "tiny", (*CORPUS, "training.precision=bfloat16")),
    Case("small-dropout-ema-muon-accumulation", "small-fast", SMALL, inspected=True),
    Case("tiny-ddp", "tiny", (*CORPUS, "training.parallel=ddp"), processes=2),
    Case("tiny-fsdp", "tiny", (*CORPUS, "training.parallel=fsdp"), processes=2),
]
QUICK_ANALYSES = ("attention", "logits")
ANALYSES = {
    "summary": (),
    "attention": ("--prompt", PROMPT),
    "heads": (),
    "lens": ("--prompt", PROMPT),
    "logits": ("--prompt", PROMPT),
    "ablate": ("--batches", "1"),
    "tokens": ("--prompt", PROMPT),
    "cache": ("--prompt", PROMPT),
    "dynamics": (),
    "diff": ("latest@0", "latest@latest", "--batches", "1"),
}


# The worker: what runs inside one version of Lumiere, with that version on its path.


def run_lumiere(record: Path | None, stop_at: int | None, arguments: list[str]) -> None:
    """Run one command; append a digest of all tensors to `record` after every step of an optimizer."""
    from lumiere.cli import main

    if record is not None:
        record_steps(record, stop_at)
    sys.argv = ["lumiere", *arguments]
    main()


def record_steps(record: Path, stop_at: int | None) -> None:
    """Write a line per optimizer step; send this process SIGTERM after `stop_at` steps."""
    import torch
    from torch.distributed.tensor import DTensor
    from torch.optim.optimizer import register_optimizer_step_post_hook

    rank = os.environ.get("RANK", "0")
    counts: Counter[int] = Counter()

    def digest(tensor: torch.Tensor) -> str:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return sha256(local.detach().contiguous().cpu())

    def hook(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = [tensor for state in optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)]
        # Sorted: the order of an optimizer's parameters is no promise.
        digests = "".join(sorted(map(digest, [*parameters, *states])))
        with record.with_name(f"{record.name}.{rank}").open("a") as file:
            file.write(f"{type(optimizer).__name__} {hashlib.sha256(digests.encode()).hexdigest()}\n")
        counts[id(optimizer)] += 1
        if stop_at is not None and max(counts.values()) == min(counts.values()) == stop_at and rank == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    register_optimizer_step_post_hook(hook)


def sha256(tensor: Any) -> str:
    """Return a digest of a CPU tensor's type, shape and bytes."""
    import torch

    header = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(header + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def print_digests(run: str) -> None:
    """Print a digest of each tensor of the last checkpoint and of each snapshot, as JSON by name."""
    import torch

    from lumiere.persistence.checkpoint_manager import CheckpointManager

    def tensors(value: object, path: str) -> Iterator[tuple[str, str]]:
        if torch.is_tensor(value):
            yield path, sha256(value.contiguous())
        elif isinstance(value, dict):
            for key, part in value.items():
                yield from tensors(part, f"{path}.{key}")

    manager = CheckpointManager()
    names = ["latest", *(name for name in manager.names(run) if name.startswith("step-"))]
    print(json.dumps(dict(pair for name in names for pair in tensors(manager.load_checkpoint(run, name), name))))


# The driver: two versions side by side.


@dataclass(frozen=True)
class Version:
    """A checkout of Lumiere, and a folder of its own to work in."""

    source: Path
    work: Path

    def call(self, *arguments: str, processes: int = 1, check: bool = True) -> str:
        """Return what a worker of this version prints."""
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = {
            **os.environ, "PYTHONPATH": str(self.source), "LUMIERE_CACHE_DIR": str(self.work / "cache"),
            "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "80",
        }  # fmt: skip
        command = [*launcher, str(Path(__file__).resolve()), "--worker", *arguments]
        done = subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True)
        if check and done.returncode != 0:
            raise SystemExit(f"{' '.join(arguments)} failed in {self.source}:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def results(self, case: Case, steps: int, analyses: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Train a case, then yield what it gave, each thing with its name."""
        shutil.rmtree(self.work / "runs", ignore_errors=True)
        record = self.work / f"steps-{case.name}"
        settings = [f"training.max_steps={steps}", "training.log_interval=1", *case.settings]
        arguments = [f"configs/{case.config}.yaml", *(word for setting in settings for word in ("--set", setting))]
        self.call("steps", str(record), str(steps // 2), "train", *arguments, processes=case.processes, check=False)
        self.call("steps", str(record), "0", "train", "--resume", "latest", processes=case.processes)
        run = next((self.work / "runs").glob("run_*"))
        for line in (run / "metrics.jsonl").read_text().splitlines():
            values = {key: value for key, value in json.loads(line).items() if key not in TIMED}
            yield f"metrics of step {values['step']}, {', '.join(values)}", json.dumps(values)
        for rank in range(case.processes):
            lines = record.with_name(f"{record.name}.{rank}").read_text().splitlines()
            for number, line in enumerate(lines):
                yield f"optimizer call {number} of rank {rank}", line
        for name, digest in json.loads(self.call("digests", run.name)).items():
            yield f"tensor {name}", digest
        if not case.inspected:
            return
        texts = {
            "generate": ("generate", "--seed", "1", "-n", "30", "--prompt", PROMPT, "--json"),
            "generate --greedy": ("generate", "--greedy", "--logprobs", "2", "-n", "30", "--prompt", PROMPT, "--json"),
            "generate, 3 texts": ("generate", "--seed", "1", "-n", "90", "--num-return-sequences", "3", "--json"),
            **{name: ("inspect", name, *ANALYSES[name], "--json") for name in analyses},
        }  # fmt: skip
        for name, words in texts.items():
            printed = self.call("run", *words)
            yield name, re.sub(rf"{run.name}|{run.name.split('_')[1]}", "RUN", printed)


def differences(name: str, reference: str, found: str, tolerance: float) -> list[str]:
    """Describe how two results of one name differ; numbers of a JSON output may by `tolerance`."""
    if reference == found:
        return []
    if not tolerance or name.startswith(("metrics", "optimizer", "tensor")):
        return [f"{name}: {_around(reference, found)}"]
    return [f"{name}{path}" for path in _json_differences(json.loads(reference), json.loads(found), tolerance)]


def _around(reference: str, found: str) -> str:
    pairs = zip(reference, found, strict=False)
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(reference), len(found)))
    return " -> ".join(repr(text[max(0, start - 60) : start + 60]) for text in (reference, found))


def _json_differences(reference: Any, found: Any, tolerance: float, path: str = "") -> Iterator[str]:
    if isinstance(reference, dict) and isinstance(found, dict) and reference.keys() == found.keys():
        for key in reference:
            yield from _json_differences(reference[key], found[key], tolerance, f"{path}.{key}")
    elif isinstance(reference, list) and isinstance(found, list) and len(reference) == len(found):
        for number, (a, b) in enumerate(zip(reference, found, strict=True)):
            yield from _json_differences(a, b, tolerance, f"{path}[{number}]")
    elif isinstance(reference, float) and isinstance(found, float):
        if not math.isclose(reference, found, rel_tol=0, abs_tol=tolerance + tolerance * abs(reference)):
            yield f"{path}: {reference} -> {found}"
    elif reference != found:
        yield f"{path}: {reference!r} -> {found!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("commit", nargs="?", help=f"what to compare with (the one in {REFERENCE.name})")
    parser.add_argument("--quick", action="store_true", help="one training of 12 steps and two analyses")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only this training")
    parser.add_argument("--tolerance", type=float, default=0.0, help="of numbers that generate and inspect print")
    arguments = parser.parse_args()

    commit = arguments.commit or REFERENCE.read_text().split()[0]
    cases = [case for case in CASES if case.name in (arguments.case or [case.name])]
    steps, analyses = 60, tuple(ANALYSES)
    if arguments.quick:
        cases, steps, analyses = cases[:1], 12, QUICK_ANALYSES
    found = []
    with tempfile.TemporaryDirectory(prefix="lumiere-gate-") as name:
        folder = Path(name)
        archive = subprocess.run(["git", "archive", commit, "lumiere"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        (folder / "source").mkdir()
        subprocess.run(["tar", "-x", "-C", str(folder / "source")], input=archive.stdout, check=True)
        versions = Version(folder / "source", folder / "before"), Version(ROOT, folder / "now")
        for version in versions:
            version.work.mkdir()
            # The recipes of this checkout, for both: a renamed preset must not hide a changed number.
            shutil.copytree(ROOT / "configs", version.work / "configs")
        for case in cases:
            before, now = (dict(version.results(case, steps, analyses)) for version in versions)
            found += [f"{case.name}: only before: {name}" for name in before.keys() - now.keys()]
            found += [f"{case.name}: only now: {name}" for name in now.keys() - before.keys()]
            same = [name for name in before if name in now]
            changed = [text for key in same for text in differences(key, before[key], now[key], arguments.tolerance)]
            found += [f"{case.name}: {text}" for text in changed]
            print(f"{case.name}: {len(same)} results compared, {len(changed)} differences", flush=True)
    for line in found[:40]:
        print(line)
    if len(found) > 40:
        print(f"... and {len(found) - 40} more")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        kind, *words = sys.argv[2:]
        if kind == "digests":
            print_digests(words[0])
        elif kind == "steps":
            run_lumiere(Path(words[0]), int(words[1]) or None, words[2:])
        else:
            run_lumiere(None, None, words)
    else:
        main()
