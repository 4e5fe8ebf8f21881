"""Feed Lumiere's readers damaged and hostile files: `python benchmarks/fuzz.py [--target config] [--runs 100000]`.

Atheris (libFuzzer) keeps each input that reaches new code and mutates it further, starting from valid files. Half of
the mutations are structural: a JSON value is replaced and the hashes are repaired, so that the code behind them is
reached. Each input must give a value or a `LumiereError` of printable lines within 10 seconds and 2 GB; failing
inputs are kept in a temporary folder. Needs Linux and `pip install -e '.[fuzz]'`.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 10
MEMORY_MB = 2048
MAX_BYTES = 32_768
INSTRUMENTED = [
    "lumiere.config",
    "lumiere.files",
    "lumiere.persistence",
    "lumiere.data.tokenizer",
    "lumiere.cli.runs",
    "lumiere.importing",
    "lumiere.interpret.activation_dataset",
]
RUN_NAME = "run_aaaaaaaa_20250819_001808"
SETTINGS = {
    "model": {
        "embedding_size": 2,
        "context_size": 4,
        "num_layers": 1,
        "num_heads": 1,
        "d_key": 2,
        "d_value": 1,
        "d_ff": 1,
    },
    "tokenizer": {"vocab_size": 262},
    "dataset": {"name": "text", "data_files": {"train": ["a.txt", "b.txt"]}, "sliding_window_size": 1},
    "training": {"learning_rate": 3e-4, "max_steps": 5, "device": "cpu", "compile": False, "patience": None},
}
RECORD = {
    "name": RUN_NAME,
    "command": ["lumiere", "train", "tiny"],
    "device": "cpu",
    "precision": "float32",
    "num_parameters": 424_416,
    "num_trained_parameters": 61_440,
    "parent": {"run": RUN_NAME, "checkpoint": "best", "step": 9, "dataset": "stories", "parent": {"run": "a"}},
    "dataset": "stories",
    "corpus_sha256": "2777181a",
    "step": 9,
    "epoch": 1.5,
    "tokens": 540,
    "best_loss": 5.22,
    "best_step": 9,
    "status": "failed",
    "error": "KeyboardInterrupt: ",
}
LINES = [
    {"step": 1, "epoch": 0.5, "tokens": 128, "time": 0.02, "loss": 5.5, "learning_rate": 0.01},
    {"step": 2, "epoch": 1.0, "tokens": 252, "time": 0.04, "val_loss": 5.4, "val_perplexity": None},
]
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    -0.0,
    2**31,
    2**63,
    10**30,
    1e308,
    "",
    "a",
    "\x1b[31m",
    "\ud800",
    "é\u202e",
    "1e3",
]


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Attributes:
        file: where the input is placed in the folder.
        read: reads the folder.
        seeds: valid inputs.
        mutate: one structural change of an input that is still well-formed.
    """

    file: Callable[[bytes], str]
    read: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, random.Random], bytes]


def run_input(target: Target, folder: Path, data: bytes) -> bool:
    """Let `target` read `data`; return whether it was accepted. Any exception is a failure.

    Raises:
        AssertionError: a message or output contains terminal control characters.
    """
    from lumiere.errors import LumiereError

    path = folder / target.file(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    try:
        target.read(folder)
    except LumiereError as error:
        check_printable(error.message + (error.hint or ""))
        return False
    else:
        return True
    finally:
        path.unlink(missing_ok=True)


def check_printable(text: str) -> None:
    assert text.isprintable(), text


# Configs


def config_file(data: bytes) -> str:
    return "config.toml" if data.startswith(b"#toml") else "config.yaml"


def read_config(folder: Path) -> None:
    """Read the file, and its first line as an override."""
    from lumiere.config.loader import assign, load_config_file, parse_override, validate
    from lumiere.errors import LumiereError

    [path] = folder.glob("config.*")
    values: dict[str, Any] = {}
    try:
        assign(values, *parse_override(path.read_bytes().split(b"\n")[0].decode("utf-8", errors="surrogateescape")))
        validate(values)
    except LumiereError as error:
        check_printable(error.message)
    config = load_config_file(path)
    assert validate(config.model_dump()) == config


def config_seeds() -> list[bytes]:
    import yaml

    block = yaml.safe_dump(SETTINGS).encode()
    flow = yaml.safe_dump(SETTINGS, default_flow_style=True, width=10**6).encode()
    toml = b'#toml\n[model]\nd_ff = 8\n[dataset]\nname = "text"\ndata_files = ["a", "b"]\n[training]\nbeta1 = 0.9\n'
    overrides = [b"model.d_ff=8\n", b"dataset.data_files=[a, b]\n", b"dataset={name: text}\n", b"training.seed=0x10\n"]
    return [block, flow, toml, *overrides]


def mutate_config(data: bytes, draw: random.Random) -> bytes:
    import yaml

    return yaml.safe_dump(changed(yaml.safe_load(data), draw), allow_unicode=draw.random() < 0.5).encode(
        "utf-8", errors="surrogatepass"
    )


# Claims


def read_claims(folder: Path) -> None:
    from lumiere.api.claim_files import read_claims

    file = read_claims(folder / "claims.yaml")
    for claim in file.claims:
        check_printable(str(claim))


def claim_seeds() -> list[bytes]:
    story = Path(__file__).parents[1] / "configs" / "claims" / "story.yaml"
    return [story.read_bytes()]


# Checkpoints


def read_checkpoint(folder: Path) -> None:
    go_on_from(folder / "best.safetensors")


def go_on_from(path: Path) -> None:
    """Do everything that happens to a checkpoint before training resumes."""
    import torch

    from lumiere.config.loader import validate
    from lumiere.persistence.checkpoint import load_checkpoint, read_metadata
    from lumiere.persistence.loading import load_weights
    from lumiere.training.state import TrainingState

    metadata = read_metadata(path)
    checkpoint = load_checkpoint(path)
    assert checkpoint.metadata == metadata
    assert checkpoint.step >= 0
    config = validate(SETTINGS)
    load_weights(config, checkpoint, "the checkpoint")
    state = TrainingState.create(config, torch.device("cpu"))
    state.restore(checkpoint)
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.update(1.0)


def trained_state() -> Any:
    """Return the checkpoint of a model after one step."""
    import torch

    from lumiere.config.loader import validate
    from lumiere.training.state import TrainingState

    config = validate(SETTINGS)
    state = TrainingState.create(config, torch.device("cpu"))
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.update(1.0)
    return state.to_checkpoint({"config": config.model_dump()})


def checkpoint_seeds() -> list[bytes]:
    import torch

    from lumiere.persistence.checkpoint import Checkpoint

    return [old_file(Checkpoint({"a": torch.ones(2, 1)}, metadata={"step": 1})), old_file(trained_state())]


def old_file(checkpoint: Any) -> bytes:
    """Return a file of format 1, which is no longer written."""
    import safetensors.torch

    from lumiere.persistence.tensor_files import hash_tensors

    metadata = json.dumps(checkpoint.metadata)
    hashes = {f"sha256.{group}": hash_tensors(getattr(checkpoint, group)) for group in ("model", "optimizer", "rng")}
    hashes["sha256.metadata"] = hashlib.sha256(metadata.encode()).hexdigest()
    texts = {"format": "pt", "lumiere_format": "1", "metadata": metadata} | hashes
    return safetensors.torch.save({name: tensor.clone() for name, tensor in checkpoint.tensors().items()}, texts)


@functools.cache
def shards() -> dict[str, bytes]:
    """Return the files of a sharded checkpoint, including its manifest."""
    from lumiere.distributed import SINGLE_PROCESS
    from lumiere.persistence.checkpoint_writer import write_checkpoint

    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name) / "best", trained_state(), SINGLE_PROCESS)
        return {path.name: path.read_bytes() for path in (Path(name) / "best").iterdir()}


def read_shards(folder: Path) -> None:
    for name, data in shards().items():
        if name != "checkpoint.json":
            (folder / "best" / name).write_bytes(data)
    go_on_from(folder / "best")


def mutate_manifest(data: bytes, draw: random.Random) -> bytes:
    """Change a value and repair the hash."""
    manifest = json.loads(data)
    del manifest["sha256"]
    manifest = changed(manifest, draw)
    with contextlib.suppress(Exception):  # the manifest is no longer well-formed
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(manifest).encode()


def mutate_checkpoint(data: bytes, draw: random.Random) -> bytes:
    """Change the header, the metadata or the tensors and repair the hashes."""
    start = 8 + int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8:start]), data[start:]
    texts = header["__metadata__"]
    choice = draw.randrange(4)
    if choice == 0:
        texts["metadata"] = json.dumps(changed(json.loads(texts["metadata"]), draw))
    elif choice == 1:
        header = changed(header, draw)
    elif choice == 2 and tensors:
        tensors = bytes(draw.choice([0, 1, 0x7F, 0xFF, b]) if draw.random() < 0.01 else b for b in tensors)
    else:
        header[draw.choice(list(header))]["dtype"] = draw.choice(
            ["F64", "F16", "I32", "BOOL", "F8_E4M3", "F4", "C64", "U16"]
        )
    with contextlib.suppress(Exception):  # the header is no longer well-formed
        texts["sha256.metadata"] = hashlib.sha256(texts["metadata"].encode("utf-8", "surrogatepass")).hexdigest()
        for group in ("model", "optimizer", "rng"):
            texts[f"sha256.{group}"] = group_hash(header, tensors, group)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def group_hash(header: dict[str, Any], data: bytes, group: str) -> str:
    """Return the hash of a group as in format 1: over names, types, shapes and bytes."""
    import safetensors.torch

    digest = hashlib.sha256()
    for name in sorted(name for name in header if name.startswith(f"{group}.")):
        begin, end = header[name]["data_offsets"]
        alone = json.dumps({"tensor": header[name] | {"data_offsets": [0, end - begin]}}).encode()
        tensor = safetensors.torch.load(len(alone).to_bytes(8, "little") + alone + data[begin:end])["tensor"]
        digest.update(json.dumps([name.removeprefix(f"{group}."), str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(data[begin:end])
    return digest.hexdigest()


# Metrics


def read_metrics(folder: Path) -> None:
    from lumiere.errors import LumiereError
    from lumiere.persistence.metrics import (
        MetricsFollower,
        MetricsWriter,
        last_records,
        read_history,
        read_metrics,
        sample_losses,
        to_json,
        truncate_metrics,
    )

    path = folder / "metrics.jsonl"
    history = read_history(path)
    for curve in (history.training, history.validation):
        assert all(math.isfinite(number) for point in curve for number in point)
    assert all(math.isfinite(loss) for loss in sample_losses(path, 4))
    to_json(last_records(path)).encode()
    list(MetricsFollower(path).poll())
    records = read_metrics(path)
    for record in records:
        to_json(record).encode()
    truncate_metrics(path, 1)
    kept = read_metrics(path)
    assert kept == [record for record in records if record["step"] <= 1]
    with MetricsWriter(path) as writer:
        writer.write({"step": 2})
    with contextlib.suppress(LumiereError):
        assert read_metrics(path) == [*kept, {"step": 2}]


def metrics_seeds() -> list[bytes]:
    whole = "".join(json.dumps(line) + "\n" for line in LINES).encode()
    return [whole, whole[:-20], b""]


def mutate_metrics(data: bytes, draw: random.Random) -> bytes:
    lines = data.splitlines()
    place = draw.randrange(len(lines))
    lines[place] = json.dumps(changed(json.loads(lines[place]), draw), ensure_ascii=draw.random() < 0.5).encode(
        "utf-8", errors="surrogatepass"
    )
    return b"\n".join(lines) + b"\n"


# Records of runs


def read_record(folder: Path) -> None:
    """Do what `runs ls` and `runs show` do, as text and as JSON, and what is written afterwards."""
    from lumiere.cli.runs.ls import list_all
    from lumiere.cli.runs.show import show_run
    from lumiere.persistence.runs import RunStore

    run = RunStore(folder).open("latest")
    assert isinstance(run.status, str)
    for as_json in (False, True):
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(io.StringIO()):
            list_all(runs_dir=str(folder), as_json=as_json)
            show_run("latest", str(folder), as_json)
        check_printable(shown.getvalue().replace("\n", ""))
    run.update(status="finished")
    assert run.status == "finished"


def record_seeds() -> list[bytes]:
    return [json.dumps(RECORD, indent=2).encode(), b"{}"]


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    text = json.dumps(changed(json.loads(data), draw), ensure_ascii=draw.random() < 0.5)
    return text.encode("utf-8", errors="surrogatepass")


# Stored evaluations


def read_evaluation(folder: Path) -> None:
    """Do what `runs show` does with evaluations, as text and as JSON."""
    from lumiere.cli.runs.show import show_run

    for as_json in (False, True):
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(io.StringIO()):
            show_run("latest", str(folder), as_json)
        check_printable(shown.getvalue().replace("\n", ""))


def evaluation_seeds() -> list[bytes]:
    values = {"checkpoint": "best", "step": 9, "corpus": "stories test", "protocol": "windows", "loss": 1.5}
    return [json.dumps(values | {"corpus_sha256": "55f2337b", "accuracy": 0.5}).encode(), b"{}"]


# Tokenizers


def read_tokenizer(folder: Path) -> None:
    from lumiere.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    for text in ("", "The owl\n", "<|sot|> é 東京 \x00"):
        tokens = tokenizer.encode(text)
        assert all(3 <= token < len(tokenizer) for token in tokens)
        assert tokenizer.decode(tokens) == text, "NFKC leaves these texts as they are"
    assert all(tokenizer.label(token).isprintable() for token in range(len(tokenizer)))
    assert len(tokenizer.fingerprint) == 64


def tokenizer_seeds() -> list[bytes]:
    from lumiere.data.tokenizer import Tokenizer

    saved = Tokenizer.train(["the owl and the other owl"], vocab_size=262, min_frequency=1).to_json()
    return [json.dumps(json.loads(saved)).encode()]


# Settings of state dicts from elsewhere

NANO = {"n_layer": 1, "n_head": 2, "n_embd": 4, "block_size": 3, "vocab_size": 5, "bias": False, "dropout": 0.1}
LENS = {"n_layers": 1, "n_heads": 2, "d_model": 4, "d_head": 2, "n_ctx": 3, "d_vocab": 5, "d_mlp": 3, "act_fn": "gelu"}
HOOKED = LENS | {"normalization_type": "RMSPre", "attn_scale": 1.5, "use_local_attn": True, "window_size": 2}
SHAPES = {
    "transformer.wte.weight": (5, 4),
    "transformer.wpe.weight": (3, 4),
    "transformer.h.0.attn.c_attn.weight": (12, 4),
    "transformer.h.0.attn.c_proj.weight": (4, 4),
    "transformer.h.0.mlp.c_fc.weight": (16, 4),
    "transformer.h.0.mlp.c_proj.weight": (4, 16),
    **{f"transformer.{name}.weight": (4,) for name in ("h.0.ln_1", "h.0.ln_2", "ln_f")},
}
HOOKED_SHAPES = {
    "embed.W_E": (5, 4),
    "pos_embed.W_pos": (3, 4),
    "unembed.W_U": (4, 5),
    "unembed.b_U": (5,),
    **{f"blocks.0.attn.{part}": (2, 4, 2) for part in ("W_Q", "W_K", "W_V")},
    "blocks.0.attn.W_O": (2, 2, 4),
    "blocks.0.mlp.W_in": (4, 3),
    "blocks.0.mlp.W_out": (3, 4),
}


def read_state_dict(folder: Path) -> None:
    import safetensors.torch
    import torch

    from lumiere.importing.huggingface import open_model

    shapes = HOOKED_SHAPES if b"d_model" in (folder / "config.json").read_bytes() else SHAPES
    safetensors.torch.save_file(
        {name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    assert open_model(folder).num_parameters > 0


def state_dict_seeds() -> list[bytes]:
    return [json.dumps(values).encode() for values in (NANO, HOOKED | {"attn_types": ["local"]})]


# Activations of a split


@functools.cache
def activations() -> dict[str, bytes]:
    """Return the files of a dataset of activations with two shards, by name."""
    import numpy as np
    import torch

    from lumiere.data.batches import Windows
    from lumiere.interpret import activation_writer
    from lumiere.models.transformer import Transformer

    torch.manual_seed(0)
    model = Transformer(8, 4, 3, num_layers=1, num_heads=1, d_key=2, d_value=2, d_ff=2).eval()
    windows = Windows(np.arange(3, 8), np.array([0, 5]), 3, 1)
    with tempfile.TemporaryDirectory() as folder:
        place, names = Path(folder) / "a", ["hook_embed"]
        planned = activation_writer.plan(place, model, windows, "validation", names, {"run": "a"}, shard_bytes=1)
        activation_writer.write(model, planned)
        return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def read_activations(folder: Path) -> None:
    from lumiere.interpret.activation_dataset import ActivationDataset

    for name, data in activations().items():
        if name != "activations.json":
            (folder / "data").mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
    ActivationDataset.open(folder, verify=True)
    for batch in ActivationDataset.open(folder).batches(batch_size=3, seed=1):
        assert all(len(tensor) <= 3 for tensor in batch.values())


# Runs at another place


def read_listing(folder: Path) -> None:
    """Pull the run that the file describes, which must bring nothing but files of a run."""
    from lumiere.persistence.listing import POINTERS, is_known
    from lumiere.persistence.runs import RunStore
    from lumiere.persistence.transfer import pull

    for name, data in THERE.items():
        (folder / "away" / RUN_NAME / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "away" / RUN_NAME / name).write_bytes(data)
    store = RunStore(folder / "pulled")
    try:
        pull(store, str(folder / "away"), RUN_NAME)
        run = store.open(RUN_NAME)
        for path in filter(Path.is_file, run.path.rglob("*")):
            name = path.relative_to(run.path).as_posix()
            assert name in (".lock", POINTERS) or (is_known(name) and path.read_bytes() == THERE[name]), name
    finally:
        assert {path.name for path in folder.iterdir()} <= {"away", "pulled"}
        shutil.rmtree(folder / "pulled", ignore_errors=True)


THERE = {"config.yaml": b"model: {}\n", "eval/best.json": b"{}", "checkpoints/step-00000001/model.safetensors": b"12"}


def listing_seeds() -> list[bytes]:
    from lumiere.persistence.listing import Entry, Listing

    files = {name: Entry(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in THERE.items()}
    return [Listing(RUN_NAME, {"best": "step-00000001", "latest": "step-00000001"}, files).to_bytes()]


# Directions


def read_direction(folder: Path) -> None:
    """Read the file, and what it adds after its own block."""
    from lumiere.persistence.directions import load_direction

    direction = load_direction(folder / "direction.safetensors")
    assert direction.step(direction.origin.layer, 0.1).shape == direction.vector.shape
    check_printable(direction.origin.method + direction.origin.run + direction.origin.checkpoint)


def direction_seeds() -> list[bytes]:
    import tempfile

    import torch

    from lumiere.persistence.directions import Direction, Origin

    origin = Origin("difference of means", 1, "run_a", "best", "a", "b")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "direction.safetensors"
        Direction(torch.arange(1.0, 4.0), torch.ones(2), origin).save(path)
        return [path.read_bytes()]


def mutate_direction(data: bytes, draw: random.Random) -> bytes:
    """Change the header, or what it says about the origin."""
    start = 8 + int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8:start]), data[start:]
    if draw.random() < 0.5:
        texts = header["__metadata__"]
        texts["origin"] = json.dumps(changed(json.loads(texts["origin"]), draw))
    else:
        header = changed(header, draw)
    text = json.dumps(header).encode("utf-8", errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + tensors


TARGETS = {
    "direction": Target(lambda data: "direction.safetensors", read_direction, direction_seeds, mutate_direction),
    "config": Target(config_file, read_config, config_seeds, mutate_config),
    "claims": Target(lambda data: "claims.yaml", read_claims, claim_seeds, mutate_config),
    "checkpoint": Target(lambda data: "best.safetensors", read_checkpoint, checkpoint_seeds, mutate_checkpoint),
    "shards": Target(
        lambda data: "best/checkpoint.json", read_shards, lambda: [shards()["checkpoint.json"]], mutate_manifest
    ),
    "metrics": Target(lambda data: "metrics.jsonl", read_metrics, metrics_seeds, mutate_metrics),
    "record": Target(lambda data: f"{RUN_NAME}/run.json", read_record, record_seeds, mutate_json),
    "evaluation": Target(lambda data: f"{RUN_NAME}/eval/best.json", read_evaluation, evaluation_seeds, mutate_json),
    "listing": Target(lambda data: f"away/{RUN_NAME}/transfer.json", read_listing, listing_seeds, mutate_json),
    "activations": Target(
        lambda data: "activations.json", read_activations, lambda: [activations()["activations.json"]], mutate_json
    ),
    "state-dict": Target(lambda data: "config.json", read_state_dict, state_dict_seeds, mutate_json),
    "tokenizer": Target(lambda data: "tokenizer.json", read_tokenizer, tokenizer_seeds, mutate_json),
}


def changed(value: Any, draw: random.Random) -> Any:
    """Return `value` with one item replaced, removed, duplicated, renamed or wrapped, at any depth."""
    children = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    if not children or draw.random() < 0.1:
        odd = draw.choice([*ODD, [], {}, [value], {"a": value}, [value] * 3, value])
        if isinstance(odd, int | float) and isinstance(value, int | float) and draw.random() < 0.5:
            return value + draw.choice([-1, 1, 0.5])
        return odd
    key, child = draw.choice(children)
    copy = value.copy()
    match draw.randrange(6):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            name = draw.choice(["", "../x", "\x1b", f"{key}x", draw.choice(list(copy))])
            copy[name] = copy.pop(key)
        case 1 if isinstance(copy, list):
            copy.insert(draw.randrange(len(copy) + 1), child)
        case _:
            copy[key] = changed(child, draw)
    return copy


# Fuzzing


def work(name: str, runs: int, seed: int, folder: Path) -> None:
    """Fuzz one target and exit; writes `summary.json` and the failing inputs."""
    import atheris  # pyright: ignore[reportMissingModuleSource]

    with atheris.instrument_imports(include=INSTRUMENTED):  # pyright: ignore[reportAttributeAccessIssue]
        import lumiere.cli.runs.ls
        import lumiere.cli.runs.show
        import lumiere.config.loader
        import lumiere.data.tokenizer
        import lumiere.persistence.loading
    import lumiere.training.state  # noqa: F401 (not instrumented: torch is slow enough)

    target, corpus, failures = TARGETS[name], folder / "corpus", {}
    corpus.mkdir()
    seeds = target.seeds()
    structured = [data for data in seeds if can_mutate(target, data)]
    for number, data in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(data)
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    counted, accepted, started = 0, 0, time.monotonic()

    def test(data: bytes) -> None:
        nonlocal counted, accepted
        counted += 1
        try:
            accepted += run_input(target, place, data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a Rust panic is not an `Exception`
            frames = traceback.extract_tb(error.__traceback__)
            where = f"{type(error).__name__} at {Path(frames[-1].filename).name}:{frames[-1].lineno}"
            if where not in failures:
                failures[where] = f"{error}"[:200]
                kept = folder / f"failure-{len(failures)}"
                kept.write_bytes(data)
                told = "".join(traceback.format_exception(error))
                kept.with_suffix(".txt").write_text(told, encoding="utf-8", errors="replace")
        if counted == runs:
            summary = {
                "inputs": counted,
                "accepted": accepted,
                "seconds": time.monotonic() - started,
                "failures": failures,
            }
            (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
            shutil.rmtree(place, ignore_errors=True)
            sys.stderr.flush()
            os._exit(0)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < 0.5:
            try:
                return target.mutate(data, draw)[:max_size]
            except Exception:  # no structure left
                return target.mutate(draw.choice(structured), draw)[:max_size]
        return atheris.Mutate(data, max_size)

    limits = [f"-max_len={MAX_BYTES}", f"-timeout={TIMEOUT_SECONDS}", f"-rss_limit_mb={MEMORY_MB}", f"-seed={seed}"]
    limits.append("-mutate_depth=1")  # a second mutation would often break the structure that the first one preserved
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}/", str(corpus)], test, custom_mutator=mutate)
    atheris.Fuzz()


def can_mutate(target: Target, data: bytes) -> bool:
    """Return whether `data` has the structure that `target.mutate` changes."""
    try:
        target.mutate(data, random.Random(0))
    except Exception:
        return False
    return True


def fuzz(name: str, runs: int, seed: int) -> bool:
    """Fuzz one target in a separate process, print the outcome, and return whether nothing failed."""
    folder = Path(tempfile.mkdtemp(prefix=f"lumiere-fuzz-{name}-"))
    options = ["--worker", str(folder), "--target", name, "--runs", str(runs), "--seed", str(seed)]
    done = subprocess.run(
        [sys.executable, __file__, *options], capture_output=True, text=True, errors="replace", check=False
    )
    path = folder / "summary.json"
    progress = re.findall(r"cov: (\d+) ft: \d+ corp: (\d+)/", done.stderr)
    coverage, kept = progress[-1] if progress else ("-", "-")
    if not path.is_file():
        artifacts = [str(file) for file in folder.iterdir() if file.name.startswith(("timeout-", "oom-", "crash-"))]
        print(f"{name:10}  ended with code {done.returncode} by {', '.join(artifacts) or 'nothing that was kept'}")
        print("\n".join(done.stderr.splitlines()[-20:]))
        return False
    summary = json.loads(path.read_bytes())
    failures = summary["failures"]
    figures = f"{summary['inputs']:>9,}  {summary['accepted']:>9,}  {summary['seconds']:>7.0f}"
    print(f"{name:10}  {figures}  {coverage:>8}  {kept:>6}  {len(failures):>8}", flush=True)
    for number, (where, message) in enumerate(failures.items(), start=1):
        print(f"            {folder}/failure-{number}: {where}: {message}")
    if not failures:
        shutil.rmtree(folder)
    return not failures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs per target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        sys.exit("atheris is not installed: pip install -e '.[fuzz]' (Linux only)")
    if options.worker:
        work(options.target, options.runs, options.seed, options.worker)
        return
    print(f"{'target':10}     inputs   accepted  seconds  coverage  corpus  failures")
    names = list(TARGETS) if options.target == "all" else [options.target]
    sound = [fuzz(name, options.runs, options.seed) for name in names]
    sys.exit(not all(sound))


if __name__ == "__main__":
    main()
