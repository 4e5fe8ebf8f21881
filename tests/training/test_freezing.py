"""Frozen parts: what a name chooses, that nothing moves them, and that the rest trains as torch trains it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lumiere.data.batches import batch_at
from lumiere.errors import CheckpointError, ConfigError
from lumiere.models.transformer import build_model, empty_model
from lumiere.persistence.runs import Run
from lumiere.training.events import StartEvent
from lumiere.training.freezing import chosen, described, trainable
from lumiere.training.loss import summed_loss
from lumiere.training.run import newest_checkpoint
from lumiere.training.schedule import learning_rate_factor
from lumiere.training.state import TrainingState
from tests.checkpoints import folder_of
from tests.torchrun import NO_DROPOUT, assert_same_training, forked
from tests.training.short import CPU, bits, hashes, of_kind, resume, short, stop_at, train, windows_of

DEEP = {"model.num_layers": 4}
LOWER_HALF = ["embeddings", "positions", "blocks.0"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embeddings", ["token_embedding."]),
        ("positions", ["position_embedding."]),
        ("final_norm", ["final_norm."]),
        ("blocks", ["blocks."]),
        ("blocks.2", ["blocks.2."]),
        ("blocks.1-3", ["blocks.1.", "blocks.2.", "blocks.3."]),
        ("blocks.3-3.attention.query", ["blocks.3.attention.query."]),
        ("blocks.attention", [f"blocks.{layer}.attention." for layer in range(4)]),
        ("blocks.0-1.feedforward_norm", ["blocks.0.feedforward_norm.", "blocks.1.feedforward_norm."]),
    ],
)
def test_what_a_name_chooses(name: str, expected: list[str]) -> None:
    model = empty_model(short(DEEP))
    names = [parameter for parameter, _ in model.named_parameters()]
    assert chosen(model, name) == [parameter for parameter in names if parameter.startswith(tuple(expected))]


@pytest.mark.parametrize(
    ("name", "in_hint"),
    [
        ("embedding", "embeddings"),
        ("token_embedding", "embeddings"),
        ("blocks.2.atention", "did you mean blocks.2.attention?"),
        ("blocks.0-1.feedfoward.up", "did you mean blocks.0-1.feedforward.up?"),
        ("blocks.4", "blocks 0-3"),
        ("blocks.2-1", "blocks 0-3"),
        ("blocks.0-", "blocks.attention"),
        ("blocks.-1", "blocks.attention"),
        ("blocks.0.attention.query.weight", "attention"),
        ("output_head", "freeze embeddings"),
        ("blocks.0.attention.query_norm", ""),  # which only some models have
        ("", ""),
        ("final_norm.", ""),
        ("norms", "final_norm"),
    ],
)
def test_a_part_that_the_model_does_not_have(name: str, in_hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trainable(short(DEEP, freeze=[name]))
    assert f"'{name}'" in caught.value.message
    assert in_hint in (caught.value.hint or "")


def test_nothing_to_train_is_refused() -> None:
    everything = ["embeddings", "positions", "blocks", "final_norm"]
    with pytest.raises(ConfigError, match="no parameter to train"):
        train(short(freeze=everything))
    untied = short({"model.tie_embeddings": False}, freeze=everything)
    assert trainable(untied).num_trained_parameters == 320 * 16, "the output head"


def parameters(run: Run, name: str = "latest") -> dict[str, torch.Tensor]:
    return load_file(folder_of(run, name) / "model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon", "ema_decay": 0.5, "gradient_clip_norm": 0.1, "weight_decay": 0.5},
        {"gradient_accumulation_steps": 3, "activation_checkpointing": True, "precision": "bfloat16"},
    ],
)
@pytest.mark.parametrize("freeze", [LOWER_HALF, ["blocks.1.attention", "blocks.feedforward.up", "final_norm"]])
def test_nothing_moves_a_frozen_part(changes: dict[str, Any], freeze: list[str]) -> None:
    config = short({"model.num_layers": 2}, snapshots=True, freeze=freeze, **changes)
    trained = train(config)
    frozen = {parameter for name in freeze for parameter in chosen(empty_model(config), name)}
    start, (event,) = parameters(trained.run, "step-00000000"), of_kind(StartEvent, trained.events)
    for checkpoint in ("best", "latest", "step-00000004"):
        end = parameters(trained.run, checkpoint)
        assert {name for name in start if torch.equal(start[name], end[name])} == frozen
    # It has no state, and counts nowhere.
    folder = folder_of(trained.run, "latest")
    assert {name.rpartition(".")[0] for name in load_file(folder / "optimizer.safetensors")} == start.keys() - frozen
    if "ema_decay" in changes:
        assert load_file(folder / "trained.safetensors").keys() == start.keys() - frozen
    number = sum(tensor.numel() for name, tensor in start.items() if name not in frozen)
    assert trained.run.record.num_trained_parameters == number < sum(map(torch.numel, start.values()))
    assert f"{number:,}" in event.frozen


def test_the_rest_trains_as_in_a_loop_of_torchs_own_parts() -> None:
    """Its AdamW and cross-entropy on the model's logits, the norm over trained gradients only."""
    config = short(NO_DROPOUT | {"model.num_layers": 2}, freeze=LOWER_HALF, gradient_clip_norm=0.05)
    trained, settings = train(config), config.training
    torch.manual_seed(settings.seed)
    model = build_model(config)
    named = [(name, p) for name, p in model.named_parameters() if name.startswith(("blocks.1.", "final_norm."))]
    groups = [
        {"params": [p for _, p in named if p.ndim == 2], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), foreach=False)
    windows, norms = windows_of(config), []
    for step in range(6):
        batch = batch_at(step, windows, settings.batch_size, settings.seed)
        logits = model(batch.tokens, torch.ones_like(batch.tokens, dtype=torch.bool)).logits
        model.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([p for _, p in named], 0.05)))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(step + 1, 6, settings)
        optimizer.step()
    assert [event.grad_norm for event in trained.steps] == pytest.approx(norms, rel=1e-5)
    assert max(norms) > 0.05 > min(norms)
    found = parameters(trained.run)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-6, msg=name)


def test_frozen_weights_change_no_gradient_of_the_others() -> None:
    """Also in the parts whose backward passes are our own."""
    config = short(NO_DROPOUT)
    model, other = build_model(config), build_model(config)
    other.load_state_dict(model.state_dict())
    for name in ("embeddings", "blocks.attention_norm", "final_norm"):
        for parameter in chosen(other, name):
            dict(other.named_parameters())[parameter].requires_grad_(False)
    batch = batch_at(0, windows_of(config), 12, 0)
    for each in (model, other):
        summed_loss(each, batch.tokens, batch.targets).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, p in other.named_parameters() if p.requires_grad} < expected.keys()
    assert bits(found) == bits({name: expected[name] for name in found})


def test_resuming_is_exact_and_keeps_what_is_frozen() -> None:
    config = short(freeze=LOWER_HALF[:2], ema_decay=0.9, optimizer="muon")
    whole = train(config, runs_dir="whole").run
    run = train(config, stop_at(3)).run
    with pytest.raises(ConfigError, match=r"training\.freeze"):
        resume(run, overrides=["training.freeze=final_norm"])
    resume(run)
    assert hashes(run) == hashes(whole)


def test_a_state_of_other_parameters_is_refused() -> None:
    """As in a run whose checkpoint and config were both edited."""
    for before, after in (([], ["final_norm"]), (["final_norm"], [])):
        for changes in ({}, {"ema_decay": 0.5}):
            checkpoint, _ = newest_checkpoint(train(short(max_steps=1, freeze=before, **changes)).run)
            assert checkpoint is not None
            state = TrainingState.create(short(freeze=after, **changes), CPU)
            if before and not changes:
                continue  # a parameter without a state is one that no step has reached yet
            with pytest.raises(CheckpointError, match="does not fit"):
                state.restore(checkpoint)


def test_the_tied_output_head_is_named() -> None:
    tied, untied = (short({"model.tie_embeddings": tie}, freeze=["embeddings"]) for tie in (True, False))
    assert described(trainable(tied), ["embeddings"]).startswith("embeddings (also the output head)")
    assert described(trainable(untied), ["embeddings"]).startswith("embeddings;")
    assert described(trainable(short()), []) == ""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(parallel: str) -> None:
    """A first block without any gradient, and one with some."""
    changes: dict[str, Any] = {"optimizer": "muon", "ema_decay": 0.9, "activation_checkpointing": True}
    freeze = [*LOWER_HALF, "blocks.1.attention"]
    config = short(NO_DROPOUT | {"model.num_layers": 3}, parallel=parallel, freeze=freeze, **changes)
    assert_same_training(forked(2, config, "by-2"), train(config).run, 2e-6)
