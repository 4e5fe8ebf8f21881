"""What the texts say is true: every command is in the README, and every command explains itself."""

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lumiere import __version__
from lumiere.cli import app

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


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_between_the_texts_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), target
