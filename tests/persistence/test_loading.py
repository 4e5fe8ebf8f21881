"""A checkpoint becomes a model only of the config that it was saved with."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere.config.loader import dump_config, validate
from lumiere.config.schema import RunConfig
from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import CheckpointError, DataError
from lumiere.models.transformer import Transformer, build_model, empty_model
from lumiere.persistence.checkpoint import Checkpoint
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.loading import check_compatible, load_weights
from lumiere.persistence.runs import Run
from tests.checkpoints import folder_of
from tests.persistence.shards import flip

MODEL = {
    "embedding_size": 8,
    "context_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "d_key": 4,
    "d_value": 4,
    "d_ff": 8,
    "positions": "rotary",
}


def config_of(**model: Any) -> RunConfig:
    return validate({"model": MODEL | model, "tokenizer": {"vocab_size": 259}})


@pytest.fixture
def saved() -> Checkpoint:
    return Checkpoint(build_model(config_of()).state_dict(), metadata={"config": config_of().model_dump()})


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 4, "d_key": 2, "d_value": 2},  # the same shapes, another function
        {"context_size": 17},  # no weight depends on it with rotary positions
        {"embedding_size": 10},
        {"num_layers": 2},
        {"positions": "learned"},
    ],
)
def test_another_model_is_refused(saved: Checkpoint, change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint 'best' does not fit the model in its config\.yaml"):
        load_weights(config_of(**change), saved, "checkpoint 'best'")


@pytest.mark.parametrize("metadata", [{}, {"config": {}}, {"config": {"model": {"num_heads": 2}}}])
def test_what_an_older_checkpoint_does_not_say_is_not_held_against_it(saved: Checkpoint, metadata: Any) -> None:
    load_weights(config_of(dropout=0.5, zero_output_init=True), replace(saved, metadata=metadata), "it")
    load_weights(config_of(dropout=0.5, zero_output_init=True), saved, "it")


@pytest.mark.parametrize("config", [None, 7, [], {"model": []}, {"model": {"num_heads": "2"}}, {"tokenizer": "a"}])
def test_a_config_that_is_none_is_refused(saved: Checkpoint, config: Any) -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        check_compatible(config_of(), replace(saved, metadata={"config": config}), "it")


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.double(),
        lambda weight: weight.to(torch.complex64),
        lambda weight: weight > 0,
        lambda weight: weight[:1],
        lambda weight: weight[None],
    ],
)
def test_a_weight_of_another_type_or_shape_is_refused(saved: Checkpoint, change: Callable[[Tensor], Tensor]) -> None:
    for name, weight in saved.model.items():
        with pytest.raises(CheckpointError, match="does not fit"):
            load_weights(config_of(), replace(saved, model=saved.model | {name: change(weight)}), "it")


@pytest.fixture
def model_run(run: Run) -> Run:
    run.config_path.write_text(dump_config(config_of()))
    return run


def save_model(run: Run, name: str, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = build_model(config_of()).state_dict()
    rng = {"cpu": torch.zeros(9, dtype=torch.uint8)}
    CheckpointManager().save(run, name, Checkpoint(state, rng=rng, metadata={"step": seed}))
    return state


def test_a_run_loads_the_weights_of_any_of_its_checkpoints(model_run: Run) -> None:
    def check(model: Transformer, state: dict[str, Tensor]) -> None:
        assert not any(module.training for module in model.modules())
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)

    latest = save_model(model_run, "latest", seed=1)
    check(model_run.load_model(), latest)  # there is no `best` yet
    best, snapshot = save_model(model_run, "best", seed=2), save_model(model_run, "step-00000003", seed=3)
    # Damage in the rest of a checkpoint does not matter.
    flip("rng.safetensors")(folder_of(model_run, "best"))
    for name, state in {"best": best, "latest": latest, "3": snapshot}.items():
        check(model_run.load_model(name), state)


def test_a_model_that_cannot_be_loaded_is_a_clear_error(model_run: Run) -> None:
    with pytest.raises(CheckpointError, match=f"run {model_run.id} has no checkpoint 'best'"):
        model_run.load_model()
    save_model(model_run, "best", seed=1)
    model_run.config_path.write_text(dump_config(config_of(num_layers=2)))
    with pytest.raises(CheckpointError, match=r"checkpoint 'best' of run .* does not fit the model in its config"):
        model_run.load_model()


def test_a_run_gives_its_config_and_its_tokenizer_back_if_the_model_has_its_rows(model_run: Run) -> None:
    assert model_run.load_config() == config_of()
    texts = ["one story", "one more story"]
    for size in (259, 262):
        tokenizer = Tokenizer.train(texts, vocab_size=size, min_frequency=1)
        model_run.tokenizer_path.write_text(tokenizer.to_json())
        if size == 259:
            assert model_run.load_tokenizer().to_json() == tokenizer.to_json()
        else:
            with pytest.raises(DataError, match=r"has 262 tokens, the model in config\.yaml 259"):
                model_run.load_tokenizer()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_refused(saved: Checkpoint, value: float) -> None:
    saved.model["final_norm.weight"][3] = value
    with pytest.raises(CheckpointError, match=r"it holds weights that are not finite numbers: final_norm\.weight"):
        load_weights(config_of(), saved, "it")


def test_a_model_of_any_size_is_compared_without_being_made(saved: Checkpoint) -> None:
    huge = config_of(embedding_size=1_000_000, d_ff=1_000_000, num_heads=1000, d_key=1000)
    assert all(parameter.is_meta for parameter in empty_model(huge).parameters())
    # 12 TB if they were made.
    assert empty_model(huge).num_parameters > 3 * 10**12
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(huge, saved, "it")
