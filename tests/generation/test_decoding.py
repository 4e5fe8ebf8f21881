"""Text, token by token: what the model is shown, which tokens may come, and where pieces are cut."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lumiere.data.dataset import TokenizedCorpus
from lumiere.data.tokenizer import EOT, PAD, SOT, Tokenizer
from lumiere.errors import LumiereError, NonFiniteError
from lumiere.generation.decoding import generate, generate_tokens
from lumiere.generation.sampling import Sampling
from lumiere.models.transformer import Transformer
from lumiere.persistence.runs import Run

GREEDY = Sampling(temperature=0)


class Script(nn.Module):
    """Stands in for a model: predicts the tokens of a script, one a call, and keeps what it was shown."""

    def __init__(self, script: Sequence[int], vocab_size: int, context_size: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.context_size = context_size
        self.vocab_size = vocab_size
        self.script = iter(script)
        self.shown: list[list[int]] = []

    def logits(self, tokens_BT: Tensor) -> Tensor:
        self.shown += tokens_BT.tolist()
        logits_BTV = torch.zeros(*tokens_BT.shape, self.vocab_size)
        logits_BTV[0, -1, next(self.script)] = 10.0
        return logits_BTV


@pytest.fixture(scope="module")
def tokenizer(tiny_corpus: TokenizedCorpus) -> Tokenizer:
    return tiny_corpus.tokenizer


@pytest.fixture
def model(trained_run: Run, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """A trained model that never ends a document, so that texts are as long as a test needs them."""
    model = trained_run.load_model()

    def endless(tokens_BT: Tensor) -> Tensor:
        logits_BTV = Transformer.logits(model, tokens_BT)
        logits_BTV[..., EOT] = -torch.inf
        return logits_BTV

    monkeypatch.setattr(model, "logits", endless)
    return model


def play(script: Sequence[int], tokenizer: Tokenizer, **settings: Any) -> list[str]:
    """The pieces that come of a script."""
    stub: Any = Script(script, len(tokenizer))
    return list(generate(stub, tokenizer, sampling=GREEDY, **settings))


def test_greedy_is_the_likeliest_token_each_time(model: Transformer, tokenizer: Tokenizer) -> None:
    """By hand, on the watching path, past the context window of 16."""
    tokens = [SOT, *tokenizer.encode("Once there was")]
    num_prompt = len(tokens)
    for _ in range(40):
        with torch.no_grad():
            logits_V = model(torch.tensor([tokens[-16:]])).logits[0, -1]
        allowed = [i for i in range(len(tokenizer)) if i not in (SOT, EOT, PAD)]
        tokens.append(max(allowed, key=lambda i: float(logits_V[i])))
    pieces = list(generate(model, tokenizer, "Once there was", 40, GREEDY))
    assert "".join(pieces) == tokenizer.decode(tokens[num_prompt:])


def test_a_seed_gives_the_same_text(model: Transformer, tokenizer: Tokenizer) -> None:
    def text(seed: int | None) -> str:
        return "".join(generate(model, tokenizer, "The", 60, seed=seed))

    first = text(3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert text(3) == first
    # The global generator is neither read nor moved.
    assert torch.equal(torch.get_rng_state(), state)
    assert text(4) != first
    assert text(None) != text(None)


def test_pieces_are_the_text_of_the_tokens(model: Transformer, tokenizer: Tokenizer) -> None:
    """Hot enough for bytes that are no characters."""
    sampling = Sampling(temperature=5.0)
    prompt = [SOT, *tokenizer.encode("The")]
    draws = torch.Generator().manual_seed(7)
    tokens = list(generate_tokens(model, prompt, 200, sampling, draws, len(tokenizer)))
    assert len(tokens) == 200
    text = tokenizer.decode(tokens)
    assert "\ufffd" in text
    assert "".join(generate(model, tokenizer, "The", 200, sampling, seed=7)) == text


def test_what_the_model_is_shown(tokenizer: Tokenizer) -> None:
    script = [*tokenizer.encode("a"), *tokenizer.encode("b")] * 20
    stub: Any = Script(script, len(tokenizer))
    list(generate(stub, tokenizer, "The fox", 40, GREEDY))
    seen = [SOT, *tokenizer.encode("The fox"), *script]
    start = len(seen) - len(script)
    assert stub.shown == [seen[max(0, end - 16) : end] for end in range(start, start + 40)]
    # Without a prompt the model begins the document.
    stub = Script(script, len(tokenizer))
    list(generate(stub, tokenizer, None, 2, GREEDY))
    assert stub.shown == [[SOT], [SOT, script[0]]]


def test_no_piece_holds_half_a_character(tokenizer: Tokenizer) -> None:
    script = tokenizer.encode("a😀é!")
    assert len(script) == 1 + 4 + 2 + 1
    assert play([*script, EOT], tokenizer) == ["a", "😀", "é", "!"]


def test_bytes_that_are_no_character_are_shown_as_such(tokenizer: Tokenizer) -> None:
    grin, a = tokenizer.encode("😀"), tokenizer.encode("a")
    # Cut off by another character, by the end of the document, and by the number of tokens.
    assert play([*grin[:2], *a, EOT], tokenizer) == ["\ufffda"]
    assert play([*a, *grin[:3], EOT], tokenizer) == ["a", "\ufffd"]
    assert play(grin, tokenizer, max_new_tokens=3) == ["\ufffd"]


def test_text_ends_with_the_document_or_the_last_token(tokenizer: Tokenizer) -> None:
    script = tokenizer.encode("xyz")
    assert play([*script, EOT, *script], tokenizer) == ["x", "y", "z"]
    assert play(script, tokenizer, max_new_tokens=2) == ["x", "y"]
    assert play([EOT], tokenizer) == []
    assert play([], tokenizer, max_new_tokens=0) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error_of_ours(value: float, temperature: float) -> None:
    class Broken(Script):
        def logits(self, tokens_BT: Tensor) -> Tensor:
            return torch.full((*tokens_BT.shape, self.vocab_size), value)

    stub: Any = Broken([], 40)
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        next(generate_tokens(stub, [SOT], 5, Sampling(temperature), torch.Generator(), 40))


def test_no_token_without_a_text_is_drawn() -> None:
    """The stub has rows for ids that are not used, and finds them likeliest."""
    num_used = 40

    class Uniform(Script):
        def logits(self, tokens_BT: Tensor) -> Tensor:
            logits_BTV = torch.zeros(*tokens_BT.shape, self.vocab_size)
            logits_BTV[..., num_used:] = 50.0
            logits_BTV[..., [SOT, PAD]] = 50.0
            logits_BTV[..., EOT] = -torch.inf
            return logits_BTV

    stub: Any = Uniform([], num_used + 5)
    draws = torch.Generator().manual_seed(0)
    assert set(generate_tokens(stub, [SOT], 500, Sampling(), draws, num_used)) == set(range(3, num_used))
    assert set(generate_tokens(stub, [SOT], 3, GREEDY, draws, num_used)) <= set(range(3, num_used))


@pytest.mark.parametrize(
    ("prompt", "message"), [("", "the prompt is empty"), (" \n", "empty"), ("\ud800", "surrogate")]
)
def test_refused_prompts(tokenizer: Tokenizer, prompt: str, message: str) -> None:
    with pytest.raises(LumiereError, match=message) as caught:
        play([EOT], tokenizer, prompt=prompt)
    assert caught.value.hint
