"""Every setting has an effect: none is read, checked, saved, and then forgotten."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from lumiere import device as device_module
from lumiere.config.loader import dump_config
from lumiere.config.messages import setting_paths
from lumiere.config.schema import RunConfig
from lumiere.data import corpus
from lumiere.distributed import SINGLE_PROCESS, TorchrunGroup
from lumiere.errors import DataError, NonFiniteError
from lumiere.models import transformer
from lumiere.training import loggers, trainer
from lumiere.training.events import CheckpointEvent, Event, StartEvent, WarningEvent
from tests.data.foreign import byte_level
from tests.training.short import CPU, hashes, of_kind, short, train

BASE = {"training.max_steps": 4, "training.warmup_steps": 2, "training.checkpoint_interval": None}
FILES = {"dataset.name": "json", "dataset.data_files": "a.json", "dataset.num_documents": None}
FOLDER = FILES | {"dataset.name": "folder", "dataset.data_files": None, "dataset.subset": "one"}
ROTARY = {"model.positions": "rotary"}
THREE_EPOCHS = {"training.max_steps": None, "training.max_epochs": 3}


@dataclass(frozen=True)
class Effect:
    """Another value of a setting, and where it shows; `given` are other settings it needs, with and without it."""

    value: Any
    shows_in: str
    given: dict[str, Any] = field(default_factory=dict)


EFFECTS = {
    "model.embedding_size": Effect(24, "num_parameters"),
    "model.context_size": Effect(12, "num_windows"),
    "model.num_layers": Effect(2, "num_parameters"),
    "model.num_heads": Effect(4, "num_parameters"),
    "model.d_key": Effect(4, "num_parameters"),
    "model.d_value": Effect(4, "num_parameters"),
    "model.d_ff": Effect(16, "num_parameters"),
    "model.dropout": Effect(0.3, "weights"),
    "model.norm": Effect("layer", "num_parameters"),
    "model.norm_epsilon": Effect(0.1, "weights"),
    "model.feedforward": Effect("gelu", "num_parameters"),
    "model.positions": Effect("rotary", "num_parameters"),
    "model.rotary_base": Effect(100.0, "weights", ROTARY),
    "model.rotary_fraction": Effect(0.5, "weights", ROTARY),
    "model.rotary_scaling": Effect({"type": "linear", "factor": 4}, "weights", ROTARY),
    "model.attention_windows": Effect([2], "weights"),
    "model.attention_scale": Effect(1.0, "weights"),
    "model.num_key_value_heads": Effect(1, "num_parameters"),
    "model.bias": Effect("all", "num_parameters"),
    "model.tie_embeddings": Effect(False, "num_parameters"),
    "model.parallel_blocks": Effect(True, "weights"),
    "model.query_key_norm": Effect(True, "num_parameters"),
    "model.zero_output_init": Effect(True, "weights"),
    "tokenizer.path": Effect("existing.json", "corpus", {"tokenizer.vocab_size": 400}),
    "tokenizer.vocab_size": Effect(300, "num_parameters"),
    "tokenizer.min_frequency": Effect(40, "corpus"),
    "tokenizer.sample_bytes": Effect(1, "corpus", {"tokenizer.vocab_size": 400, "dataset.num_documents": 10}),
    "tokenizer.normalizer": Effect("none", "corpus"),
    "dataset.name": Effect("chains", "corpus"),
    "dataset.subset": Effect("other", "corpus", FOLDER),
    "dataset.data_files": Effect("b.json", "corpus", FILES),
    "dataset.data_sha256": Effect("0" * 64, "refused", FILES),
    "dataset.text_column": Effect("title", "corpus", FILES),
    "dataset.streaming": Effect(True, "split_validation_of_stream", FILES),
    "dataset.document_start": Effect("^row 2$", "num_windows", FILES),
    "dataset.num_documents": Effect(2, "corpus"),
    "dataset.validation_fraction": Effect(0.5, "corpus", {"dataset.num_documents": 10}),
    "dataset.seed": Effect(2, "corpus"),
    "dataset.sliding_window_size": Effect(0, "num_windows"),
    "training.batch_size": Effect(6, "summed_loss"),
    "training.random_window_offset": Effect(True, "weights"),
    "training.loss_positions": Effect("last", "num_windows"),
    "training.gradient_accumulation_steps": Effect(3, "summed_loss"),
    "training.parallel": Effect("fsdp", "parallelize"),
    "training.gather_limit_gb": Effect(0.0, "snapshots", {"training.parallel": "fsdp", "training.snapshots": True}),
    "training.activation_checkpointing": Effect(True, "checkpoint"),
    "training.rank_timeout": Effect(60, "connect"),
    "training.max_epochs": Effect(2, "end", THREE_EPOCHS),
    "training.max_steps": Effect(3, "end"),
    "training.optimizer": Effect("muon", "weights"),
    "training.learning_rate": Effect(2e-2, "learning_rates"),
    "training.muon_learning_rate": Effect(0.01, "weights", {"training.optimizer": "muon"}),
    "training.beta1": Effect(0.5, "weights"),
    "training.beta2": Effect(0.9, "weights"),
    "training.weight_decay": Effect(0.5, "weights"),
    "training.muon_weight_decay": Effect(0.5, "weights", {"training.optimizer": "muon"}),
    "training.ema_decay": Effect(0.5, "weights"),
    "training.freeze": Effect(["embeddings"], "weights"),
    "training.gradient_clip_norm": Effect(0.01, "weights"),
    "training.on_nonfinite": Effect("skip", "skipped", {"training.learning_rate": 1e10}),
    "training.schedule": Effect("constant", "learning_rates"),
    "training.decay_fraction": Effect(0.5, "learning_rates"),
    "training.warmup_steps": Effect(0, "learning_rates"),
    "training.patience": Effect(1, "end", THREE_EPOCHS | {"training.stopping_threshold": 100.0}),
    "training.stopping_threshold": Effect(100.0, "end", THREE_EPOCHS | {"training.patience": 1}),
    "training.eval_interval": Effect(2, "evaluated"),
    "training.log_interval": Effect(3, "reported"),
    "training.checkpoint_interval": Effect(2, "saved"),
    "training.snapshots": Effect(True, "snapshots"),
    "training.loggers": Effect(["tensorboard", "wandb", "trackio"], "logged"),
    "training.precision": Effect("bfloat16", "summed_loss"),
    "training.compile": Effect(True, "compile"),
    "training.device": Effect("cuda", "resolve_device"),
    "training.seed": Effect(1, "weights"),
}

# Settings that report on training, and do not decide what it computes.
WATCHING = ("eval_interval", "log_interval", "checkpoint_interval", "snapshots", "loggers")
ONLY_WATCHING = [f"training.{name}" for name in WATCHING]

Observe = Callable[[RunConfig], dict[str, Any]]


def write_files() -> None:
    """Files of rows that say where they are from, each alone between blank ones."""
    Path("folder").mkdir()
    for name in ("a", "b", "folder/c", "folder/d"):
        texts = [text for number in range(4) for text in ("", f"row {number}", "", f"In {name} stands a long row.")]
        rows = [{"text": text, "title": text.upper()} for text in texts]
        Path(f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    subsets = "[{config_name: one, data_files: c.json}, {config_name: other, data_files: d.json}]"
    Path("folder/README.md").write_text(f"---\nconfigs: {subsets}\n---\n", encoding="utf-8")


class Log:
    def __init__(self, name: str, seen: list[Any]) -> None:
        self.name = name
        self.seen = seen

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.seen.append((self.name, *metrics))

    def close(self, failed: bool) -> None:
        self.seen.append((self.name, "closed"))


@pytest.fixture
def observe_afresh(monkeypatch: pytest.MonkeyPatch) -> Observe:
    """Trains a config, and returns everything that can be observed."""

    def observe(config: RunConfig) -> dict[str, Any]:
        if config.dataset.name not in ("stories", "chains") and not Path("a.json").exists():
            write_files()
        if config.tokenizer.path is not None:
            byte_level().save(config.tokenizer.path)
        seen: dict[str, list[Any]] = {}
        events: list[Event] = []
        with monkeypatch.context() as patch:

            def watch(owner: Any, name: str, note: Callable[..., Any], instead: Any = None) -> None:
                """Note the result and the arguments of every call of a function, or of what stands in for it."""
                function = instead or getattr(owner, name)

                def call(*arguments: Any, **options: Any) -> Any:
                    result = function(*arguments, **options)
                    seen.setdefault(name, []).append(note(result, *arguments))
                    return result

                patch.setattr(owner, name, call)

            watch(trainer, "summed_loss", lambda loss, model, tokens, targets: (len(tokens), product_type()))
            watch(trainer, "parallelize", lambda result, model, objective, parallel, *rest: parallel)
            watch(corpus, "split_validation_of_stream", lambda *given: True)
            watch(TorchrunGroup, "connect", lambda result, group, limit: limit, lambda group, limit: None)
            watch(device_module, "resolve_device", lambda result, name: name, lambda name: CPU)
            watch(torch, "compile", lambda *given: True, lambda function, **options: function)
            watch(transformer, "checkpoint", lambda *given: True, lambda function, *given, **options: function(*given))
            patch.setattr(loggers, "distribution", lambda name: None)
            for name in loggers.LOGGERS:
                log = Log(name, seen.setdefault("logged", []))
                patch.setitem(loggers.LOGGERS, name, lambda *given, log=log: log)
            try:
                trained = train(config, events.append, processes=TorchrunGroup(SINGLE_PROCESS, HashStore()))
            except DataError as error:
                return {"refused": error.message}
            except NonFiniteError:
                # With or without the steps that broke, such weights cannot be evaluated.
                return {"skipped": [event.step for event in of_kind(WarningEvent, events)]}
        (start,) = of_kind(StartEvent, trained.events)
        return seen | {
            "weights": hashes(trained.run),
            "num_parameters": start.num_parameters,
            "num_windows": start.num_windows,
            "corpus": trained.run.record.corpus_sha256,
            "end": trained.end,
            "reported": [event.step for event in trained.steps],
            "learning_rates": [event.learning_rate for event in trained.steps],
            "evaluated": [event.step for event in trained.evaluations],
            "saved": [event.step for event in of_kind(CheckpointEvent, events) if event.name == "latest"],
            "snapshots": sorted(
                "/".join(path.parts[-2:]) for path in trained.run.checkpoints_dir.glob("snapshots/*/*.safetensors")
            ),
        }

    return observe


def product_type() -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


@pytest.fixture(scope="module")
def observed() -> dict[str, dict[str, Any]]:
    """What trainings showed, by config: most of the tests below compare with the same one."""
    return {}


@pytest.fixture
def observe(observe_afresh: Observe, observed: dict[str, dict[str, Any]]) -> Observe:
    """The same, without training the same config again."""

    def once(config: RunConfig) -> dict[str, Any]:
        key = dump_config(config)
        if key not in observed:
            observed[key] = observe_afresh(config)
        return observed[key]

    return once


def test_the_table_has_every_setting() -> None:
    assert list(EFFECTS) == setting_paths()


def test_the_same_config_gives_the_same_bits(observe: Observe, observe_afresh: Observe) -> None:
    assert observe_afresh(short(BASE)) == observe(short(BASE))


@pytest.mark.parametrize("path", EFFECTS)
def test_every_setting_has_an_effect(observe: Observe, path: str) -> None:
    effect = EFFECTS[path]
    before = short(BASE | effect.given)
    after = short(BASE | effect.given | {path: effect.value})
    assert before != after
    assert observe(before).get(effect.shows_in) != observe(after).get(effect.shows_in)


@pytest.mark.parametrize("path", ONLY_WATCHING)
def test_watching_changes_no_weight(observe: Observe, path: str) -> None:
    changed = short(BASE | {path: EFFECTS[path].value})
    assert observe(changed)["weights"] == observe(short(BASE))["weights"]
