"""What the texts say is true: every command is in the README, and every command explains itself."""

import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from lumiere import __version__
from lumiere.cli import app
from lumiere.config.loader import load_config
from lumiere.persistence.runs import Run, RunStore
from lumiere.training.run import start
from lumiere.training.setup import set_up

ROOT = Path(__file__).parents[1]


def commands() -> dict[str, list[str]]:
    """Every command, as typed, with the options that its help lists."""
    found = {}

    def walk(command: object, path: tuple[str, ...]) -> None:
        children = getattr(command, "commands", None)
        if children:
            for name, child in children.items():
                walk(child, (*path, name))
        else:
            options = [o for p in command.params for o in p.opts if o.startswith("--")]  # pyright: ignore
            found[" ".join(path)] = options

    walk(typer.main.get_command(app), ("lumiere",))
    return found


COMMANDS = commands()


def test_the_commands_of_the_mission_are_there() -> None:
    assert set(COMMANDS) == {
        "lumiere tokenize",
        "lumiere train",
        "lumiere eval",
        "lumiere generate",
        "lumiere export",
        "lumiere inspect ablate",
        "lumiere inspect attention",
        "lumiere inspect diff",
        "lumiere inspect dynamics",
        "lumiere inspect lens",
        "lumiere inspect logits",
        "lumiere inspect report",
        "lumiere inspect summary",
        "lumiere inspect cache",
        "lumiere inspect heads",
        "lumiere inspect tokens",
        "lumiere runs card",
        "lumiere runs ls",
        "lumiere runs show",
        "lumiere runs compare",
        "lumiere runs plot",
        "lumiere runs watch",
        "lumiere runs tag",
        "lumiere runs note",
        "lumiere runs rm",
        "lumiere runs prune",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme_and_explains_its_options(command: str) -> None:
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    shown = CliRunner().invoke(app, [*command.split()[1:], "--help"]).stdout
    for option in COMMANDS[command]:
        assert option in shown


def test_readme_shows_only_options_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in re.findall(r"^\$? *(lumiere .*)$", text, flags=re.MULTILINE):
        command = max((c for c in COMMANDS if line.startswith(c)), key=len, default=None)
        if command is None:
            assert line.split()[1] in ("--help", "--version"), line
            continue
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", line.split("#")[0]):
            assert option in COMMANDS[command], f"{line}: no option {option}"


def test_the_changelog_has_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.fixture
def run_of_the_card() -> None:
    """A run of the card's model under the card's name, before its first step."""
    config = load_config("small", ["dataset={name: stories, num_documents: 5}"], {"training.max_steps": 1})
    run = start(set_up(config), RunStore()).run
    run.update(created_at="2025-08-19T00:18:08.000+00:00")
    run.path.rename(run.path.with_name("run_hiq6ihsb_20250819_001808"))


@pytest.mark.usefixtures("run_of_the_card")
def test_python_snippets_run_in_their_order(trained_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained_run.path, Path("runs") / trained_run.name)
    names: dict[str, Any] = {}
    for path, num_snippets in (("docs/generation.md", 1), ("README.md", 4)):
        text = (ROOT / path).read_text(encoding="utf-8")
        snippets = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        assert len(snippets) == num_snippets
        names.clear()
        for snippet in snippets:
            exec(snippet, names)
        assert len(capsys.readouterr().out) > 10, "a generated text is printed"
    vocab_size = trained_run.load_config().tokenizer.vocab_size
    assert names["without_first_mlp"].shape == (*names["tokens"].shape, vocab_size)
    assert not torch.equal(names["without_first_mlp"], names["output"].logits)
    assert names["tokens"][0, 0] == 0
    assert names["model"].num_parameters == 1_188_992, "the last one is the card's"


def test_no_text_installs_the_package_of_another_project() -> None:
    """`lumiere` on PyPI is not this project."""
    texts = [
        *ROOT.glob("*.*"),
        *(path for folder in ("docs", "lumiere", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.*")),
    ]
    for path in texts:
        if path.suffix in (".md", ".py", ".toml", ".cff"):
            found = re.search(r"pip install[^\n]*[ '\"=]lumiere(?!-)\b", path.read_text(encoding="utf-8"))
            assert found is None, f"{path}: {found}"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"] == "lumiere-lm"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_between_the_texts_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), target
