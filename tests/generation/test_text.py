"""Text generation from Python."""

from pathlib import Path

import pytest

from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import LumiereError
from lumiere.generation import text
from lumiere.generation.decoding import Limits, generate
from lumiere.generation.sampling import Sampling
from lumiere.generation.text import TextGenerator
from lumiere.persistence.runs import Run

GREEDY = Sampling(temperature=0)
PROMPTS = ["The", "Once upon a time", None, "A fox", "x " * 20]


@pytest.fixture(scope="module")
def generator(trained_run: Run) -> TextGenerator:
    return TextGenerator(trained_run.load_model().double(), trained_run.load_tokenizer())


def test_three_lines(trained_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the module's docstring, the README and docs/generation.md."""
    monkeypatch.setenv("LUMIERE_RUNS_DIR", str(trained_run.path.parent))
    lines = [line.strip() for line in (text.__doc__ or "").splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    root = Path(__file__).parents[2]
    for path in (root / "README.md", root / "docs" / "generation.md"):
        assert "\n".join(lines) in path.read_text(encoding="utf-8")
    exec("\n".join(lines))
    model, tokenizer = trained_run.load_model(), trained_run.load_tokenizer()
    assert capsys.readouterr().out == "".join(generate(model, tokenizer, "Once upon a time", seed=1)) + "\n"


def test_a_text_depends_on_its_place_and_not_on_the_batch_size(generator: TextGenerator) -> None:
    def texts(batch_size: int) -> list[str]:
        made = generator.write_many(PROMPTS, Sampling(), Limits(30), 9, num_return_sequences=2, batch_size=batch_size)
        return [generation.text for generation in made]

    assert texts(1) == texts(3) == texts(64)
    assert len(set(texts(64))) == 10
    assert texts(64)[0] == generator.write("The", Sampling(), Limits(30), 9).text
    streamed = generator.stream("The", Sampling(), Limits(30), 9)
    assert "".join(piece.text for piece in streamed) == texts(64)[0]


def test_what_a_generation_says(generator: TextGenerator, tokenizer: Tokenizer) -> None:
    generation = generator.write("The", Sampling(), Limits(20), seed=4)
    assert (generation.prompt, generation.seed) == ("The", 4)
    assert generation.text == tokenizer.decode([token.id for token in generation.tokens])
    assert (len(generation.tokens) == 20) == (generation.finish_reason == "length")
    # Without a seed it reports the one that gives the text again.
    drawn = generator.write("The", Sampling(), Limits(20))
    assert generator.write("The", Sampling(), Limits(20), drawn.seed) == drawn
    whole = generator.write("The", GREEDY, Limits(30))
    assert whole.seed is None
    stop = whole.text[7:9]
    cut = generator.write("The", GREEDY, Limits(30, stop=(stop,)))
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")


def test_search(generator: TextGenerator, tokenizer: Tokenizer) -> None:
    found = generator.search("The", num_beams=3, max_new_tokens=6, num_return_sequences=2)
    assert len(found) == 2
    scores = [generation.score or 0.0 for generation in found]
    assert scores == sorted(scores, reverse=True)
    assert found[0].text == tokenizer.decode([token.id for token in found[0].tokens])
    greedy = generator.write("The", GREEDY, Limits(6))
    (one,) = generator.search("The", 1, max_new_tokens=6)
    assert [token.id for token in one.tokens] == [token.id for token in greedy.tokens]


def test_the_check_holds_and_can_fail(trained_run: Run) -> None:
    generator = TextGenerator(trained_run.load_model(), trained_run.load_tokenizer())
    generation = generator.write("The", Sampling(), Limits(40), seed=1)
    check = generator.check(generation)
    assert check.holds
    assert check.num_steps == len(generation.tokens) + 1
    assert check.difference <= check.tolerance == 1e-4
    generator.model.blocks[1].attention.key.weight.data += 0.1  # the decoder has a copy of the weights before
    failed = generator.check(generation)
    assert not failed.holds
    assert failed.difference > 1e-4


def test_refused(generator: TextGenerator) -> None:
    for wrong in (
        lambda: generator.write_many(["a"], num_return_sequences=0),
        lambda: generator.write_many(["a"], batch_size=0),
        lambda: generator.write_many(["a"], GREEDY, num_return_sequences=2),
        lambda: generator.write_many(["a", " "]),
        lambda: generator.search("a", num_beams=2, num_return_sequences=3),
        lambda: generator.search("a", max_new_tokens=-1),
        lambda: generator.search("a", num_beams=0, num_return_sequences=1),
        lambda: generator.stream(""),
    ):
        with pytest.raises(LumiereError) as caught:
            wrong()
        assert caught.value.hint
