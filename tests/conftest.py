"""Shared fixtures. No test touches the user's files, the network, or another test's files."""

import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from lumiere.config.loader import validate
from lumiere.config.schema import RunConfig
from lumiere.data.dataset import TokenizedCorpus, tokenize_corpus
from lumiere.persistence.runs import Run, RunStore
from lumiere.training.run import start
from lumiere.training.setup import set_up

# A busy machine must not fail a property test.
settings.register_profile("quick", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=100)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

TINY = {
    "model": {
        "embedding_size": 16,
        "context_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "d_key": 8,
        "d_value": 8,
        "d_ff": 32,
        "dropout": 0.1,
    },
    "tokenizer": {"vocab_size": 320},
    "dataset": {"name": "stories", "num_documents": 10, "validation_fraction": 0.2, "sliding_window_size": 4},
    "training": {
        "batch_size": 8,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "warmup_steps": 4,
        "eval_interval": 4,
        "log_interval": 2,
        "device": "cpu",
        "precision": "float32",
    },
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the files in tests/golden")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], str]:
    """Read a file of tests/golden. With `--update-golden`, first write the second argument to it."""

    def read(name: str, computed: str) -> str:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.write_text(computed, encoding="utf-8")
        return path.read_text(encoding="utf-8")

    return read


@pytest.fixture(autouse=True)
def isolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus_cache: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUMIERE_CACHE_DIR", str(corpus_cache))
    monkeypatch.delenv("LUMIERE_RUNS_DIR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hugging-face"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    # As in an active environment, so that hints print `lumiere` without a path.
    monkeypatch.setenv("PATH", os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"])))
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models gain nothing from threads, and parallel tests lose."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of tokenized corpora for all tests, since corpora are found by fingerprint."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_config() -> RunConfig:
    """A config that trains in a second: two layers of width 16 on ten stories."""
    return validate(TINY)


@pytest.fixture(scope="session")
def tiny_corpus(tiny_config: RunConfig, corpus_cache: Path) -> Iterator[TokenizedCorpus]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUMIERE_CACHE_DIR", str(corpus_cache))
        yield tokenize_corpus(tiny_config)


def train_session_run(config: RunConfig, folder: Path, corpus_cache: Path) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUMIERE_CACHE_DIR", str(corpus_cache))
        return start(set_up(config), RunStore(folder / "runs"), command=["lumiere", "train"]).run


@pytest.fixture(scope="session")
def trained_run(tiny_config: RunConfig, tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path) -> Run:
    """A finished run in its own runs directory. Read-only: copy it before changing it."""
    return train_session_run(tiny_config, tmp_path_factory.mktemp("trained"), corpus_cache)


@pytest.fixture(scope="session")
def other_tokenizer_run(tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path) -> Run:
    """A finished run on the same stories with a smaller vocabulary. Read-only."""
    config = validate(TINY | {"tokenizer": {"vocab_size": 290}})
    return train_session_run(config, tmp_path_factory.mktemp("other_tokenizer"), corpus_cache)


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """The folder of WikiText-2, which is not part of the project."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext"
    if not folder.is_dir():
        pytest.skip(f"WikiText-2 is not at {folder}")
    return folder
