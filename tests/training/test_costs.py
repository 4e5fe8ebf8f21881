"""What training takes, compared with a model, its optimizers, a run's folder and a training run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lumiere.config.loader import load_config
from lumiere.config.schema import RunConfig
from lumiere.models.transformer import Transformer, build_model
from lumiere.training import costs
from lumiere.training.costs import Parameters
from lumiere.training.events import StartEvent
from lumiere.training.freezing import trainable
from lumiere.training.optim import Optimizers
from tests.training.short import PEAK_FLOPS, files_of, names, short, train

# Sizes that are all different, so that none can stand for another.
UNEVEN = {
    "model.embedding_size": 20,
    "model.context_size": 12,
    "model.num_layers": 3,
    "model.num_heads": 5,
    "model.d_key": 6,
    "model.d_value": 7,
    "model.d_ff": 33,
    "model.dropout": 0.5,
    "tokenizer.vocab_size": 301,
}
SHAPES: list[dict[str, Any]] = [{}, UNEVEN, UNEVEN | {"model.positions": "rotary"}]


def test_the_card_by_hand() -> None:
    config = load_config("small")
    parameters = costs.count_parameters(config)
    assert parameters == Parameters(
        token_embedding=4096 * 128,
        positions=64 * 128,
        attention=4 * 4 * 128 * 128,
        feedforward=4 * 3 * 128 * 256,
        norms=9 * 128,
        output_head=0,
    )
    assert parameters.total == 1_188_992
    # PaLM's 6 N + 12 L H Q T, where N are all parameters except positions and norms.
    assert costs.flops_per_token(config) == 6 * (1_188_992 - 8192 - 1152) + 12 * 4 * 4 * 32 * 64


def test_parts_of_another_architecture_by_hand() -> None:
    settings = {"feedforward": "gelu", "norm": "layer", "bias": "all", "tie_embeddings": "false", "positions": "none"}
    settings |= {"num_key_value_heads": 1, "query_key_norm": "true"}
    parameters = costs.count_parameters(short(UNEVEN | {f"model.{name}": value for name, value in settings.items()}))
    attention = 20 * 5 * 6 + 20 * 6 + 20 * 7 + 5 * 7 * 20
    assert parameters == Parameters(
        token_embedding=301 * 20,
        positions=0,
        attention=3 * (attention + 5 * 6 + 6 + 7 + 20),
        feedforward=3 * (2 * 20 * 33 + 33 + 20),
        norms=2 * 20 * 7 + 3 * 2 * 6,
        output_head=301 * 20,
    )


def counted_flops(config: RunConfig, compute: Callable[[Transformer, torch.Tensor], object]) -> int:
    """The FLOPs that torch counts while `compute` uses a model on two windows."""
    model = build_model(config)
    tokens = torch.randint(3, config.tokenizer.vocab_size, (2, config.model.context_size))
    # The counter knows the products of the math backend, but not those of the CPU's fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compute(model, tokens)
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_that_torch_counts(shape: dict[str, Any]) -> None:
    config = short(shape)
    flops = costs.flops_per_token(config) * 2 * config.model.context_size
    with torch.no_grad():
        assert flops == 3 * counted_flops(config, lambda model, tokens: model.logits(tokens))
    assert flops == counted_flops(config, lambda model, tokens: model(tokens).logits.sum().backward())


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bytes_of_weights_and_optimizer(shape: dict[str, Any], optimizer: str) -> None:
    config = short(shape, optimizer=optimizer)
    model = build_model(config)
    optimizers = Optimizers(model, config.training)
    model.logits(torch.full((1, config.model.context_size), 3)).sum().backward()
    optimizers.step(1.0)
    assert costs.weight_bytes(config) == sum(parameter.nbytes for parameter in model.parameters())
    # Without AdamW's step counts, one number per parameter.
    averages = [tensor for tensor in optimizers.state_tensors().values() if tensor.ndim]
    assert costs.optimizer_bytes(config) == sum(tensor.nbytes for tensor in averages)
    averaging = short(shape, optimizer=optimizer, ema_decay=0.9)
    assert costs.optimizer_bytes(averaging) - costs.optimizer_bytes(config) == costs.weight_bytes(config)


@pytest.mark.parametrize(
    ("optimizer", "ema_decay", "snapshots"), [("adamw", None, True), ("adamw", 0.5, False), ("muon", 0.5, True)]
)
def test_disk_is_what_a_run_takes(optimizer: str, ema_decay: float | None, snapshots: bool) -> None:
    config = short(optimizer=optimizer, ema_decay=ema_decay, max_steps=9, snapshots=snapshots)
    run = train(config).run
    sizes = {name: sum(path.stat().st_size for path in files_of(run, name)) for name in names(run)}
    disk = costs.disk(config, total_steps=9)
    assert disk.num_snapshots == sum(name.startswith("step-") for name in sizes) == 5 * snapshots
    # Headers, counters and the state of the generators are not counted.
    assert 0 < sizes["latest"] - disk.checkpoint < 30_000
    written_next = sizes["latest"]
    assert 0 < sum(sizes.values()) + written_next - disk.total < 30_000 * (len(sizes) + 1)


def test_mfu_is_a_fraction_of_the_measured_peak() -> None:
    trained = train(short({"model.num_layers": 2}, max_steps=3))
    started = trained.events[0]
    assert isinstance(started, StartEvent)
    assert started.peak_flops == trained.run.record.peak_flops == PEAK_FLOPS
    # Width 16, two blocks of 2 heads of 8 and 32 neurons, 320 tokens, 16 positions.
    flops = 6 * (16 * 320 + 2 * (4 * 16 * 16 + 3 * 16 * 32)) + 12 * 2 * 2 * 8 * 16
    assert [step.mfu for step in trained.steps] == pytest.approx(
        [step.tokens_per_second * flops / PEAK_FLOPS for step in trained.steps]
    )


@pytest.mark.parametrize(
    "freeze", [["embeddings"], ["blocks"], ["embeddings", "positions", "blocks.0-1"], ["blocks.1.feedforward"]]
)
@pytest.mark.parametrize("is_tied", [True, False])
def test_frozen_parts_take_no_gradient(freeze: list[str], is_tied: bool) -> None:
    config = short(UNEVEN | {"model.dropout": 0.0, "model.tie_embeddings": is_tied}, freeze=freeze)

    def backward(model: Transformer, tokens: torch.Tensor) -> None:
        frozen = trainable(config)
        for parameter, other in zip(model.parameters(), frozen.parameters(), strict=True):
            parameter.requires_grad_(other.requires_grad)
        model.logits(tokens).sum().backward()

    with torch.enable_grad():
        flops = counted_flops(config, backward)
    assert costs.flops_per_token(config) * 2 * config.model.context_size == flops


def test_frozen_parts_take_no_memory_and_no_room() -> None:
    config = short(UNEVEN, freeze=["embeddings", "blocks.0"], optimizer="muon", ema_decay=0.5, snapshots=True)
    run = train(config).run
    state = sum(path.stat().st_size for path in files_of(run) if path.name != "rng.safetensors")
    assert costs.disk(config, 6).checkpoint == pytest.approx(state, rel=0.1)
    assert costs.gradient_bytes(config) == 4 * (run.record.num_trained_parameters or 0)
