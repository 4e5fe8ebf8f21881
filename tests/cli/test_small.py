"""A corpus of two bytes or of one line, contexts of 1 to 3 tokens: every command works or says what is too small."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lumiere.cli import app
from lumiere.config.loader import validate
from lumiere.persistence.runs import RunStore
from lumiere.training.run import start
from lumiere.training.setup import set_up

LINE = "hello hello world hello"
SIZES = {
    "two-bytes": ("ab", 8),
    "two-bytes-context-1": ("ab", 1),
    "line": (LINE, 8),
    "line-context-1": (LINE, 1),
    "line-context-2": (LINE, 2),
    "line-context-3": (LINE, 3),
}
MODEL = {"embedding_size": 8, "num_layers": 1, "num_heads": 1, "d_key": 4, "d_value": 4, "d_ff": 8, "dropout": 0.0}
TRAINING = {"batch_size": 2, "max_steps": 2, "device": "cpu", "precision": "float32", "warmup_steps": 0}


Call = Callable[[str, str], Result]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A runs directory with one run of a name of `SIZES`, trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("small")

    @cache
    def train(name: str) -> str:
        text, context_size = SIZES[name]
        file = folder / f"{name}.txt"
        file.write_text(text)
        dataset = {"name": "text", "data_files": str(file), "sliding_window_size": 0}
        values = {"model": MODEL | {"context_size": context_size}, "tokenizer": {"vocab_size": 260}}
        start(set_up(validate(values | {"dataset": dataset, "training": TRAINING})), RunStore(folder / name))
        return str(folder / name)

    return train


@pytest.fixture
def call(runs_dir: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command on the run of a name of `SIZES`: it works, or says what is too small."""

    def run(name: str, command: str) -> Result:
        monkeypatch.setenv("LUMIERE_RUNS_DIR", runs_dir(name))
        Path("text.txt").write_text("ab")
        result = CliRunner().invoke(app, command.split())
        assert isinstance(result.exception, SystemExit | None), f"{command}: {result.exception!r}"
        assert result.exit_code in (0, 2), result.output
        if result.exit_code:
            *_, error, hint = result.stderr.splitlines()
            assert (error[:7], hint[:6]) == ("error: ", "hint: ")
        return result

    return run


@pytest.mark.parametrize("command", ["inspect heads", "inspect dynamics", "inspect report"])
@pytest.mark.parametrize("name", ["two-bytes-context-1", "line-context-1", "line-context-2"])
def test_contexts_without_room_for_a_repeated_token(name: str, command: str, call: Call) -> None:
    result = call(name, command)
    assert result.exit_code == 2
    assert "model.context_size=3" in result.stderr
    assert not Path("report.html").exists()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        # The training split of the two bytes is one token.
        *(("two-bytes", f"inspect {rest}") for rest in ("report", "report --prompt a", "heads --random 1")),
        ("two-bytes", "inspect dynamics -m induction"),
        *(("line-context-1", f"inspect dynamics -m {name}") for name in ("validation-loss", "lens-depth", "norm")),
    ],
)
def test_what_needs_no_repeated_tokens_works(name: str, command: str, call: Call) -> None:
    assert call(name, command).exit_code == 0


TEXTS = ("", " --prompt a", " --file text.txt", " --val 0", " --random 1")
COMMANDS = [
    *("eval latest", "eval latest --stride 1", "eval latest --split train", "eval latest --text text.txt"),
    *("eval latest --json", "eval latest -o eval.svg", "generate --max-new-tokens 2", "generate --check --prompt a"),
    *("generate --prompt a --max-new-tokens 3 --logprobs 2", "generate --prompt ab --num-beams 2 --max-new-tokens 2"),
    *(f"inspect {name}{text}" for name in ("attention", "lens", "logits", "tokens", "heads") for text in TEXTS),
    *(f"inspect {name}{text}" for name in ("ablate", "cache", "dynamics", "diff latest latest@0") for text in TEXTS),
    *(f"inspect {name} --prompt a -o out.svg" for name in ("attention", "lens", "logits", "tokens", "heads", "ablate")),
    *("inspect attention --kind rollout", "inspect ablate --mode resample", "inspect ablate --unit neuron"),
    *("inspect logits --log-prob", "inspect summary", "inspect summary --verify -o out.svg", "inspect heads --verify"),
    *("inspect dynamics -o out.html", "inspect diff latest latest@0 -o out.svg", "inspect report --prompt a"),
    *(f"inspect dynamics -m {metric}" for metric in ("lens-depth", "in-context-score", "repeat-gap", "copying")),
    *("runs ls", "runs show latest", "runs plot latest -o out.svg", "runs card latest"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_every_command_works_or_says_what_is_too_small(name: str, call: Call) -> None:
    for command in COMMANDS:
        assert "nan" not in call(name, command).stdout, command
