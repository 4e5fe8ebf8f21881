"""The documentation matches the program: commands, options, Python snippets, links and paths."""

import math
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from lumiere import __version__
from lumiere.cli import app
from lumiere.config.loader import dump_config, load_config
from lumiere.config.schema import RunConfig
from lumiere.persistence.runs import Run, RunStore
from lumiere.training.run import start
from lumiere.training.setup import set_up

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS[Path("README.md")]

# From the original model card, as printed there.
CARD_RUN = "run_hiq6ihsb_20250819_001808"
CARD_EXAMPLE = f"""\
checkpoint = checkpoint_manager.load_checkpoint("{CARD_RUN}", "best")
model = Transformer(vocab_size=4096, embedding_size=128, context_size=64,
                    num_layers=4, num_heads=4, d_key=32, d_value=32, d_ff=256)
model.load_state_dict(checkpoint["model_state_dict"])
"""


def commands() -> dict[str, list[str]]:
    """Return every command, as typed, with its options."""
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


def test_every_command_is_in_the_readme() -> None:
    assert len(COMMANDS) > 20
    assert [command for command in COMMANDS if command not in README] == []


def test_the_pages_show_only_options_that_exist() -> None:
    unknown = []
    for path, text in TEXTS.items():
        for line in re.findall(r"^(?:\$|   ) *(lumiere .*)$", text, flags=re.MULTILINE):
            command = max((c for c in COMMANDS if line.startswith(c)), key=len, default=None)
            known = COMMANDS[command] if command else ["--help", "--version"]
            options = re.findall(r"(?<!\S)--[a-z][a-z-]*", line.split("#")[0])
            unknown += [(str(path), line, option) for option in options if option not in known]
    assert unknown == []


def test_the_changelog_and_the_citation_have_this_version() -> None:
    assert f"## {__version__}" in TEXTS[Path("CHANGELOG.md")]
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def snippets_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TEXTS[Path(page)], re.DOTALL | re.MULTILINE)


def test_the_page_about_python_runs_in_order(
    trained_run: Run, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained_run.path, Path("runs") / trained_run.name)
    training = tiny_config.training.model_copy(update={"eval_interval": 50})
    Path("tiny.yaml").write_text(dump_config(tiny_config.model_copy(update={"training": training})))
    monkeypatch.setattr("lumiere.config.loader.shipped_configs", lambda: {"tiny": Path("tiny.yaml")})
    names: dict[str, Any] = {}
    for snippet in snippets_of("docs/python.md"):
        exec(snippet, names)
    assert names["found"].patterns.shape[:2] == (1, 1)
    assert names["mean_stream"].shape == (16,)
    assert names["first"].step <= 100 < names["first"].model.num_parameters
    assert names["second"].config.training.seed == 1
    assert all(Path(name).stat().st_size > 1000 for name in ("attention.svg", "report.html"))
    assert names["score"].loss == pytest.approx(math.log(names["score"].perplexity))


def test_the_page_about_causes_runs_in_order(trained_run: Run) -> None:
    shutil.copytree(trained_run.path, Path("runs") / trained_run.name)
    names: dict[str, Any] = {}
    for snippet in snippets_of("docs/causes.md"):
        exec(snippet, names)
    assert not torch.equal(names["without"], names["run"].model(names["tokens"]).logits)
    assert names["gradients"]["blocks.0.hook_resid_post"].any()


def test_python_snippets_run_in_order(trained_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The last one is the example of the original model card, on a run of that name."""
    config = load_config("small", ["dataset={name: stories, num_documents: 5}"], {"training.max_steps": 2})
    run = start(set_up(config), RunStore()).run
    run.update(created_at="2025-08-19T00:18:08.000+00:00")
    run.path.rename(run.path.with_name(CARD_RUN))
    shutil.copytree(trained_run.path, Path("runs") / trained_run.name)
    names: dict[str, Any] = {}
    for page, num_snippets in (("docs/generation.md", 1), ("README.md", 4)):
        snippets = snippets_of(page)
        assert len(snippets) == num_snippets
        names.clear()
        for snippet in snippets:
            exec(snippet, names)
        assert len(capsys.readouterr().out) > 10, "a generated text is printed"
    assert names["without_first_mlp"].shape == (*names["tokens"].shape, trained_run.load_config().tokenizer.vocab_size)
    assert not torch.equal(names["without_first_mlp"], names["output"].logits)
    assert names["tokens"][0, 0] == 0

    assert CARD_EXAMPLE in README
    model, tokens = names["model"].eval(), torch.arange(3, 13)[None]
    assert model.num_parameters == 1_188_992
    output = model(tokens)
    assert output.logits.shape == (1, 10, 4096)
    assert output.attention_weights.shape == (1, 4, 4, 10, 10)
    assert output.hidden_states.shape == (1, 5, 10, 128)
    assert torch.equal(RunStore().open("hiq6ihsb").load_model("best")(tokens).logits, output.logits)


def test_no_text_installs_the_package_of_another_project() -> None:
    """`lumiere` on PyPI is another project."""
    folders = (".", "docs/", "lumiere/**/", "benchmarks/", "tests/**/")
    found = (path for folder in folders for path in ROOT.glob(f"{folder}/*.*"))
    files = [path for path in found if path.suffix in (".md", ".py", ".toml", ".cff")]
    pattern = re.compile(r"pip install[^\n]*[ '\"=]lumiere(?!-)\b")
    assert len(files) > 100
    assert [str(path) for path in files if pattern.search(path.read_text(encoding="utf-8"))] == []
    assert tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"] == "lumiere-lm"


def test_links_and_paths_in_the_pages_exist() -> None:
    missing = []
    for page, text in TEXTS.items():
        links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text)
        missing += [
            (str(page), link) for link in links if "://" not in link and not (ROOT / page.parent / link).exists()
        ]
        if page.name != "CHANGELOG.md":  # which also names what is gone
            paths = re.findall(r"\b(?:tests|benchmarks|configs|lumiere)/[\w/]+\.(?:py|yaml|json|txt|md)\b", text)
            missing += [(str(page), path) for path in paths if not (ROOT / path).exists()]
    assert missing == []
