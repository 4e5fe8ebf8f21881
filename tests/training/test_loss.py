"""The objective by hand, and what happens if `torch.compile` fails."""

import copy
import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lumiere.config.schema import RunConfig
from lumiere.data.batches import IGNORED
from lumiere.models.transformer import Transformer, build_model
from lumiere.training.loss import compiled, summed_loss

CXX = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


@pytest.fixture
def model(tiny_config: RunConfig) -> Transformer:
    """With weights large enough that the losses of the tokens differ."""
    model = build_model(tiny_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 320, (4, 16))


@pytest.fixture
def targets() -> torch.Tensor:
    """Of four windows, of which one has three targets and one has a single one."""
    targets = torch.randint(3, 320, (4, 16))
    targets[1, 3:] = IGNORED
    targets[3, 1:] = IGNORED
    return targets


def test_sum_over_targets_without_padding(model: Transformer, tokens: torch.Tensor, targets: torch.Tensor) -> None:
    logits = model.logits(tokens).detach().double().numpy()
    losses = [
        np.log(np.exp(logits[row, column]).sum()) - logits[row, column, target]
        for (row, column), target in np.ndenumerate(targets.numpy())
        if target != IGNORED
    ]
    assert len(losses) == 16 + 3 + 16 + 1
    assert np.ptp(losses) > 1
    assert summed_loss(model, tokens, targets).item() == pytest.approx(sum(losses), rel=1e-5)


@pytest.mark.parametrize("level", [-200.0, -105.0, -95.0, 90.0, 200.0])
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 0.02)])
def test_loss_and_gradients_of_logits_far_from_zero(
    tiny_config: RunConfig,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    level: float,
    precision: torch.dtype,
    tolerance: float,
) -> None:
    model = build_model(tiny_config).eval()
    size = model.embedding_size
    with torch.no_grad():
        # By far the largest component of every residual, which the last norm makes sqrt(size).
        model.token_embedding.weight[:, 0] = 100.0
        model.get_parameter("final_norm.weight")[0] = level / 100.0 / math.sqrt(size)
    assert ((model.logits(tokens) / level - 1).abs() < 0.1).all()
    wide = copy.deepcopy(model).double()
    expected = F.cross_entropy(wide.logits(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        loss = summed_loss(model, tokens, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    # Of the components that differ: in the first one, rounding errors of the probabilities are multiplied by 100.
    (mine,) = torch.autograd.grad(loss, [model.token_embedding.weight])
    (plain,) = torch.autograd.grad(expected, [wide.token_embedding.weight])
    assert torch.dist(mine[:, 1:].double(), plain[:, 1:]) < tolerance * plain[:, 1:].norm()


def test_padding_has_no_gradient(model: Transformer, tokens: torch.Tensor, targets: torch.Tensor) -> None:
    def gradients(inputs: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(summed_loss(model, inputs, targets), list(model.parameters())))

    changed = tokens.clone()
    changed[1, 3:] = 7
    changed[3, 1:] = 9
    for mine, other in zip(gradients(tokens), gradients(changed), strict=True):
        torch.testing.assert_close(mine, other)


def failing_at(call: int) -> Callable[..., Any]:
    """A `torch.compile` that raises (0), or whose function raises at its call of that number."""
    calls = itertools.count(1)

    def compile_function(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if next(calls) >= call:
                raise RuntimeError("no C++ compiler found\nand a long trace")
            return function(*arguments)

        if call == 0:
            run()
        return run

    return compile_function


@pytest.mark.parametrize("call", [0, 1, 2])
def test_if_compiling_fails_it_warns_once_and_continues(
    model: Transformer, tokens: torch.Tensor, targets: torch.Tensor, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    monkeypatch.setattr(torch, "compile", failing_at(call))
    warnings: list[str] = []
    objective = compiled(warnings.append)
    expected = summed_loss(model, tokens, targets)
    for number in range(1, 5):
        assert torch.equal(objective(model, tokens, targets), expected)
        assert len(warnings) == (number >= call)
    assert warnings[0].endswith(": no C++ compiler found")


def test_if_compiling_works_the_compiled_function_is_used(
    model: Transformer, tokens: torch.Tensor, targets: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilations: list[Any] = []

    def doubling(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compilations.append(function)
        return lambda *arguments: 2 * function(*arguments)

    monkeypatch.setattr(torch, "compile", doubling)
    warnings: list[str] = []
    objective = compiled(warnings.append)
    expected = summed_loss(model, tokens, targets, lambda model, tokens: 2 * model.final_residual(tokens))
    assert not torch.equal(expected, summed_loss(model, tokens, targets))
    assert torch.equal(objective(model, tokens, targets), expected)
    assert torch.equal(objective(model, tokens, targets), expected)
    assert (compilations, warnings) == ([Transformer.final_residual], [])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls what torch has deprecated
@pytest.mark.filterwarnings("ignore::UserWarning")  # and looks at the gradients of what it traces
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its helpers leave pipes open
@pytest.mark.skipif(CXX is None, reason="torch.compile needs a C++ compiler, and none is on PATH")
def test_compiled_losses_and_gradients_are_the_same(
    tiny_config: RunConfig,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    one_layer = tiny_config.model.model_copy(update={"num_layers": 1, "dropout": 0.2})
    model = build_model(tiny_config.model_copy(update={"model": one_layer}))
    warnings: list[str] = []
    fast = compiled(warnings.append)
    losses = []
    for objective in (fast, summed_loss):
        torch.manual_seed(0)  # of the dropout
        losses.append(objective(model, tokens, targets))
    assert warnings == []
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-4 * 36)
    mine, other = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    for gradient, expected in zip(mine, other, strict=True):
        assert torch.dist(gradient, expected) <= 1e-4 * expected.norm()
