"""A model that writes, from Python."""

from pathlib import Path

import pytest

from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import LumiereError
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
    from lumiere.generation import text

    monkeypatch.setenv("LUMIERE_RUNS_DIR", str(trained_run.path.parent))
    lines = [line.strip() for line in (text.__doc__ or "").splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    root = Path(__file__).parents[2]
    for path in (root / "README.md", root / "docs" / "generation.md"):
        assert "\n".join(lines) in path.read_text(encoding="utf-8")
    exec("\n".join(lines))
    model, tokenizer = trained_run.load_model(), trained_run.load_tokenizer()
    assert capsys.readouterr().out == "".join(generate(model, tokenizer, "Once upon a time", seed=1)) + "\n"


def test_a_text_depends_on_its_place_and_not_on_the_size_of_the_batch(generator: TextGenerator) -> None:
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
    assert generation.prompt == "The"
    assert generation.seed == 4
    assert generation.text == tokenizer.decode([token.id for token in generation.tokens])
    assert (len(generation.tokens) == 20) == (generation.finish_reason == "length")
    # Without a seed it says which one gives the text again.
    drawn = generator.write("The", Sampling(), Limits(20))
    assert generator.write("The", Sampling(), Limits(20), drawn.seed) == drawn
    assert generator.write("The", GREEDY, Limits(5)).seed is None


def test_stop_strings(generator: TextGenerator) -> None:
    whole = generator.write("The", GREEDY, Limits(30)).text
    stop = whole[7:9]
    cut = generator.write("The", GREEDY, Limits(30, stop=(stop,)))
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_search(generator: TextGenerator, tokenizer: Tokenizer) -> None:
    found = generator.search("The", num_beams=3, max_new_tokens=6, num_return_sequences=2)
    assert len(found) == 2
    assert found[0].score >= found[1].score  # type: ignore[operator]
    assert found[0].text == tokenizer.decode([token.id for token in found[0].tokens])
    assert [token.id for token in generator.search("The", 1, max_new_tokens=6)[0].tokens] == [
        token.id for token in generator.write("The", GREEDY, Limits(6)).tokens
    ]


def test_the_check_holds_and_can_fail(trained_run: Run) -> None:
    generator = TextGenerator(trained_run.load_model(), trained_run.load_tokenizer())
    generation = generator.write("The", Sampling(), Limits(40), seed=1)
    check = generator.check(generation)
    assert check.holds
    assert check.num_steps == len(generation.tokens) + 1
    assert check.difference <= check.tolerance == 1e-4
    # The decoder has a copy of the weights that were.
    generator.model.blocks[1].attention.key.weight.data += 0.1
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
        lambda: generator.stream(""),
    ):
        with pytest.raises(LumiereError) as caught:
            wrong()
        assert caught.value.hint
