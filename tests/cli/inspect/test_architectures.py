"""Every command on a run of another architecture: a page and a figure, or two lines."""

from pathlib import Path
from typing import Any

import pytest

from lumiere.config.loader import validate
from lumiere.persistence.runs import Run
from tests.cli.commands import invoke, read_json, refuse
from tests.conftest import TINY, train_session_run
from tests.models.build import VARIANTS

NAMES = ("layer norm, biases", "attention only", "grouped queries")
ANALYSES = {
    "attention": (),
    "lens": ("--sublayers",),
    "logits": ("--by", "neuron"),
    "heads": (),
    "summary": (),
    "ablate": (),
    "saliency": (),
    "circuit": ("--prompt=One day a", "--corrupt=One day b", "--metric=kl"),
    "tokens": (),
    "cache": (),
    "dynamics": (),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name != "grouped queries")) for name in NAMES],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path) -> Run:
    model: dict[str, Any] = TINY["model"] | {"num_layers": 2, "d_key": 8} | VARIANTS[request.param]
    training = TINY["training"] | {"max_steps": 3}
    config = validate(TINY | {"model": model, "training": training})
    return train_session_run(config, tmp_path_factory.mktemp("architectures"), corpus_cache)


@pytest.fixture(autouse=True)
def runs_dir(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMIERE_RUNS_DIR", str(run.path.parent))


@pytest.mark.parametrize("name", ANALYSES)
def test_a_page_whose_checks_hold(name: str) -> None:
    """A check that fails would exit with 3."""
    assert invoke("inspect", name, *ANALYSES[name]).stdout


@pytest.mark.parametrize("name", ["logits", "summary"])
def test_a_figure_with_the_parts_of_the_model(name: str) -> None:
    invoke("inspect", name, *ANALYSES[name], "-o", "figure.svg")


def test_units_that_a_model_lacks_are_refused(run: Run) -> None:
    if run.load_config().model.feedforward != "none":
        pytest.skip("the model has feed-forward parts")
    for unit in ("neuron", "feedforward"):
        error, _ = refuse("inspect", "ablate", "--unit", unit, after_notes=True)
        assert "model.feedforward" in error


def test_the_report_the_card_and_the_other_commands(run: Run) -> None:
    invoke("inspect", "report", "-o", "page.html")
    card = invoke("runs", "card", run.id).stdout
    model = run.load_config().model
    snippet = card.partition("model = Transformer(")[2].partition(")\nmodel.load")[0]
    rebuilt = eval(f"dict({snippet})")  # the card's own example, with our settings
    assert {
        name: value for name, value in model.model_dump().items() if name in rebuilt and value != rebuilt[name]
    } == {}
    changed = {
        name for name, value in model.model_dump(exclude={"dropout"}).items() if value != TINY_DEFAULTS.get(name)
    }
    assert changed <= rebuilt.keys()
    assert read_json("eval", run.id)["loss"] > 0
    assert invoke("generate", "--run", run.id, "--max-new-tokens", "20", "--seed", "1").stdout
    assert invoke("runs", "show", run.id).stdout


TINY_DEFAULTS = validate({}).model.model_dump()
