"""Blocks that are computed again in the backward pass, instead of being kept: the same gradients from less memory."""

import pytest
import torch

from lumiere.models.transformer import Transformer
from lumiere.training.loss import compiled, summed_loss


def model(activation_checkpointing: bool, dropout: float, positions: str = "learned") -> Transformer:
    torch.manual_seed(3)
    shape = {"embedding_size": 16, "context_size": 12, "num_layers": 3, "num_heads": 2, "d_key": 8, "d_value": 8}
    options = {"positions": positions, "activation_checkpointing": activation_checkpointing}
    return Transformer(vocab_size=50, d_ff=32, dropout=dropout, **shape, **options)  # pyright: ignore


def tokens() -> torch.Tensor:
    return torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(0))


def gradients(of: Transformer, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = summed_loss(of, tokens(), tokens().roll(-1, 1))
    found = torch.autograd.grad(loss, list(of.parameters()))
    return (*found, loss.detach(), torch.get_rng_state())


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_loss_and_random_numbers_are_the_same_bits(
    dtype: torch.dtype, dropout: float, positions: str
) -> None:
    expected = gradients(model(False, dropout, positions), dtype)
    found = gradients(model(True, dropout, positions), dtype)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def kept_bytes(of: Transformer) -> int:
    """Of what autograd keeps from the forward pass, each piece of memory once."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = summed_loss(of, tokens(), tokens())
    assert loss.requires_grad
    return sum(kept.values())


def test_of_a_block_only_what_it_reads_is_kept() -> None:
    one_stream = 4 * 12 * 16 * 4
    assert kept_bytes(model(True, 0.0)) < kept_bytes(model(False, 0.0)) - 3 * 5 * one_stream


def test_blocks_are_computed_twice_in_training_and_once_without_gradients() -> None:
    computed: list[int] = []
    watched = model(True, 0.0)
    for number, block in enumerate(watched.blocks):
        # Before it, because the second time ends as soon as all is there that the backward pass needs.
        block.register_forward_pre_hook(lambda *_, number=number: computed.append(number))
    gradients(watched)
    assert computed == [0, 1, 2, 2, 1, 0]
    computed.clear()
    with torch.no_grad():
        watched.logits(tokens())
    assert computed == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_training_has_the_same_gradients() -> None:
    warnings: list[str] = []
    recomputing = model(True, 0.5)
    torch.manual_seed(5)
    loss = compiled(warnings.append)(recomputing, tokens(), tokens().roll(-1, 1))
    found = torch.autograd.grad(loss, list(recomputing.parameters()))
    assert not warnings
    for one, other in zip(found, gradients(model(False, 0.5)), strict=False):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
