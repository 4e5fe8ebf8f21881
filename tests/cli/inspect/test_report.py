"""`lumiere inspect report`: what it writes, and refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lumiere.cli import app
from lumiere.data.dataset import TokenizedCorpus
from lumiere.persistence.runs import Run


def inspect_report(run: Run, *options: str) -> Result:
    return CliRunner().invoke(app, ["inspect", "report", "--runs-dir", str(run.path.parent), *options])


def data_of(file: Path) -> dict:
    (data,) = re.findall(r'id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(data)


def test_the_default_texts(trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    result = inspect_report(trained_run)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("written to report.html, ")
    data = data_of(Path("report.html"))
    sources = [text["source"] for text in data["texts"]]
    assert sources[0] == "window 0 of the validation split"
    assert sources[1].endswith(" of the validation split")
    assert sources[2] == "7 random tokens of the training split, twice"
    repeated = data["texts"][2]["tokens"]
    assert repeated[1:8] == repeated[8:]


def test_prompts(trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    result = inspect_report(trained_run, "-p", "One day", "-p", "a cat", "-o", "page.HTML")
    assert result.exit_code == 0, result.output
    data = data_of(Path("page.HTML"))
    expected = [[0, *tiny_corpus.tokenizer.encode(prompt)] for prompt in ("One day", "a cat")]
    assert [text["tokens"] for text in data["texts"]] == expected


def test_the_same_page_twice(trained_run: Run) -> None:
    for name in ("a.html", "b.html"):
        inspect_report(trained_run, "-p", "One day", "-o", name)
    assert Path("a.html").read_bytes() == Path("b.html").read_bytes()


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (("-o", "page.pdf"), "'page.pdf'", "ends in .html"),
        (("-o", "no/page.html"), "'no'", "create it first"),
        (("-p", " "), "the prompt is empty", "validation split"),
        (("-p", "One day " * 20), "the model sees 16", "shorten it"),
    ],
)
def test_bad_input(trained_run: Run, options: tuple[str, ...], message: str, hint: str) -> None:
    result = inspect_report(trained_run, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert hint in result.stderr
    assert not list(Path().glob("*.html"))


def test_without_the_corpus(trained_run: Run, tmp_path: Path) -> None:
    """Another corpus than that of the training is none: what it would tell is left out, and it is said."""
    copy = tmp_path / "other" / trained_run.name
    shutil.copytree(trained_run.path, copy)
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(record | {"corpus_sha256": "0" * 64}))
    result = CliRunner().invoke(app, ["inspect", "report", "--runs-dir", str(copy.parent)])
    assert result.exit_code == 0, result.output
    assert "only random tokens are shown" in result.stderr
    data = data_of(Path("report.html"))
    assert [text["source"] for text in data["texts"]] == ["7 random tokens of the vocabulary, twice"]
    assert data["neurons"] is None
