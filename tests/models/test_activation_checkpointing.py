"""Blocks computed again in the backward pass instead of being kept: the same gradients from less memory."""

from typing import Any

import pytest
import torch

from lumiere.components.hooks import hooked
from lumiere.models.transformer import Transformer
from lumiere.training.loss import compiled, summed_loss
from tests.models.build import VARIANTS, make_model

TOKENS_BT = torch.randint(13, (4, 9), generator=torch.Generator().manual_seed(0))
TARGETS_BT = TOKENS_BT.roll(-1, 1)


def model(activation_checkpointing: bool, dropout: float = 0.0, **variant: Any) -> Transformer:
    torch.manual_seed(3)
    changes = {"dropout": dropout, "activation_checkpointing": activation_checkpointing}
    return make_model(std=0.1, **changes, **variant).train()


def gradients(of: Transformer, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = summed_loss(of, TOKENS_BT, TARGETS_BT)
    found = torch.autograd.grad(loss, list(of.parameters()))
    return (*found, loss.detach(), torch.get_rng_state())


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_loss_and_random_numbers_are_bit_identical(
    dtype: torch.dtype, dropout: float, variant: dict[str, Any]
) -> None:
    expected = gradients(model(False, dropout, **variant), dtype)
    found = gradients(model(True, dropout, **variant), dtype)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_blocks_with_hooks_are_kept_because_the_hooks_are_gone_in_the_backward_pass() -> None:
    def hooked_gradients(of: Transformer) -> tuple[torch.Tensor, ...]:
        with hooked(of, {"blocks.1.mlp.hook_post": torch.square}):
            loss = of.logits(TOKENS_BT).square().mean()
        return torch.autograd.grad(loss, list(of.parameters()))

    found, expected = (hooked_gradients(model(checkpointing)) for checkpointing in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def kept_bytes(of: Transformer) -> int:
    """Of what autograd keeps from the forward pass, each piece of memory once."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = summed_loss(of, TOKENS_BT, TOKENS_BT)
    assert loss.requires_grad
    return sum(kept.values())


def test_of_a_block_only_its_input_is_kept() -> None:
    one_stream = 4 * 9 * 12 * 4
    assert kept_bytes(model(True)) < kept_bytes(model(False)) - 3 * 5 * one_stream


def test_blocks_are_computed_twice_in_training_and_once_without_gradients() -> None:
    computed: list[int] = []
    watched = model(True)
    for number, block in enumerate(watched.blocks):
        # Before the block, because recomputation stops once the backward pass has all it needs.
        block.register_forward_pre_hook(lambda *_, number=number: computed.append(number))
    gradients(watched)
    assert computed == [0, 1, 1, 0]
    computed.clear()
    with torch.no_grad():
        watched.logits(TOKENS_BT)
    assert computed == [0, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_training_has_the_same_gradients() -> None:
    warnings: list[str] = []
    recomputing = model(True, 0.5)
    torch.manual_seed(5)
    loss = compiled(warnings.append)(recomputing, TOKENS_BT, TARGETS_BT)
    found = torch.autograd.grad(loss, list(recomputing.parameters()))
    assert not warnings
    for one, other in zip(found, gradients(model(False, 0.5)), strict=False):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
