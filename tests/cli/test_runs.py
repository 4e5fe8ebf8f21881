"""The `lumiere runs` commands on runs that were really trained: what they print, delete, and give to scripts."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lumiere.cli import app
from lumiere.cli.runs import edit, watch
from lumiere.config.loader import load_config
from lumiere.persistence.catalog import disk_bytes
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.metrics import read_metrics
from lumiere.persistence.notes import read_notes
from lumiere.persistence.runs import Run, RunStore
from tests.checkpoints import folder_of, remove_pointers
from tests.cli import commands

OTHER = "run_zzzzzzzz_20990101_000000"


def invoke(*arguments: str, answer: str | None = None, code: int = 0) -> Result:
    return commands.invoke("runs", *arguments, text=answer, code=code)


def run_command(*arguments: str) -> str:
    return invoke(*arguments).stdout


def read_json(*arguments: str) -> Any:
    return commands.read_json("runs", *arguments)


@pytest.fixture
def other(run: Run) -> Run:
    """The same again, half as long, with another seed, a worse loss, and newer."""
    other = Run(Path("runs") / OTHER)
    shutil.copytree(run.path, other.path)
    lines = [line for line in read_metrics(run.metrics_path) if line["step"] <= 8]
    other.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    other.update(best_loss=(run.record.best_loss or 0) + 1, step=8, created_at="2099-01-01T00:00:00+00:00")
    other.config_path.write_text(run.config_path.read_text().replace("max_steps: 12", "max_steps: 8"))
    return other


def test_ls_shows_the_curve_and_the_tags(run: Run, other: Run) -> None:
    run_command("tag", run.id, "base-1", "v2")
    heading, first, second = run_command("ls").splitlines()
    assert heading.split() == ["id", "status", "parameters", "steps", "best", "loss", "curve", "age", "corpus"]
    assert first.startswith("zzzzzzzz")
    assert second.endswith("stories  #base-1 #v2")
    (curve,) = re.findall("[▁▂▃▄▅▆▇█]+", second)
    losses = [line["loss"] for line in read_metrics(run.metrics_path) if "loss" in line]
    assert len(curve) == len(losses) == 6
    assert curve[losses.index(max(losses))] == "█"
    assert curve[losses.index(min(losses))] == "▁"


def test_ls_filters_and_sorts(run: Run, other: Run) -> None:
    other.update(status="interrupted")
    run_command("tag", run.id, "mine")

    def ids(*arguments: str) -> list[str]:
        return [entry["id"] for entry in read_json("ls", *arguments)]

    assert ids() == ids("--status", "finished", "--status", "interrupted") == ["zzzzzzzz", run.id]
    assert ids("--sort", "loss", "-n", "1") == ids("--status", "finished") == ids("--tag", "mine") == [run.id]
    assert "no matching runs" in invoke("ls", "--tag", "none").stderr


DAMAGE: list[Callable[[Run], object]] = [
    lambda run: run.record_path.write_text('{"status": ["\\u001b[31m"], "best_loss": 1' + "0" * 400 + "}"),
    lambda run: run.record_path.write_text('{"status": "\\ud800", "dataset": "\\u001b[2J", "command": 5}'),
    lambda run: run.record_path.write_text('{"machine": {"gpus": 3, "threads": []}, "command": [1, null, "\\u001b"]}'),
    lambda run: run.config_path.write_text('model: {"\\e[31m": "\\e[2J"}'),
    lambda run: run.config_path.unlink(),
    lambda run: run.metrics_path.write_text('{"step": 3, "loss": "\\u001b", "tokens": [], "tokens_per_second": {}}\n'),
    lambda run: run.metrics_path.write_text('{"step": 3, "val_loss": [], "time": "x"}\n{"step": 1' + "0" * 400 + "}\n"),
    lambda run: run.metrics_path.write_bytes(b"\xff\x00" * 5000),
    lambda run: (run.path / "notes.json").write_text('{"tags": ["\\u001b", 5], "note": "\\u001b[31m \\ud800"}'),
    lambda run: (run.checkpoints_dir / "pointers.json").write_bytes(b"\x1b"),
    lambda run: (folder_of(run, "best") / "checkpoint.json").write_bytes(b"\x1b"),
    lambda run: shutil.rmtree(run.checkpoints_dir),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_crash_nothing_and_steer_no_terminal(
    run: Run, other: Run, damage: Callable[[Run], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SECONDS_BETWEEN_LOOKS", 0.001)
    damage(other)
    for command in ("ls", "show latest", f"compare latest {run.id}", "plot latest", "watch latest"):
        for options in ((), ("--json",)):
            result = CliRunner().invoke(app, ["runs", *command.split(), *options])
            assert result.exit_code in (0, 2), result.output
            assert isinstance(result.exception, SystemExit | None), command
            assert result.output.replace("\n", "").isprintable()


def test_show_says_how_it_went_and_how_to_repeat_it(run: Run) -> None:
    run_command("tag", run.id, "good")
    run_command("note", run.id, "worth another [look]")
    shown = run_command("show", run.id[:4])
    metrics = read_metrics(run.metrics_path)
    evaluation = next(line for line in reversed(metrics) if "val_loss" in line)
    training = next(line for line in reversed(metrics) if "loss" in line)
    for expected in (
        "tags       good",
        "note       worth another [look]",
        f"step 12 of 12, epoch {training['epoch']:.2f}, {training['tokens']:,} tokens",
        f"validation loss {run.record.best_loss:.4f} at step {run.record.best_step}",
        f"training loss {training['loss']:.4f} at step 12",
        f"validation loss {evaluation['val_loss']:.4f}",
        f"  lumiere train {run.config_path}\n",
        "  lumiere train  original command",
    ):
        assert expected in shown
    assert re.search(r"model.context_size +16  default 64", shown)
    assert re.search(r"training.beta1 +0.9\n", shown)


def test_show_says_where_a_run_started(run: Run) -> None:
    first = {"run": "run_aaaaaaaa_20250101_000000", "checkpoint": "best", "step": 9, "dataset": "chains"}
    second = first | {"run": "run_bbbbbbbb_20250101_000000", "checkpoint": "512", "step": 1512, "parent": first}
    run.update(parent=second, num_trained_parameters=12)
    shown = run_command("show", run.id)
    assert f"from       {second['run']}@512 (step 1,512, chains), from {first['run']}@best (step 9, chains)\n" in shown
    assert f"  lumiere train {run.config_path} --from {second['run']}@512\n" in shown
    assert "parameters, 12 of them trained\n" in shown
    assert read_json("show", run.id)["parent"] == second


def test_show_as_json_has_it_all(run: Run) -> None:
    shown = read_json("show", "latest")
    names = [checkpoint["name"] for checkpoint in shown["checkpoints"]]
    assert names == CheckpointManager("runs").names(run)
    for checkpoint in shown["checkpoints"]:
        assert checkpoint["num_bytes"] == disk_bytes(folder_of(run, checkpoint["name"]))
    assert shown["checkpoints"][names.index("step-00000004")]["step"] == 4
    assert shown["disk_bytes"] == sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    assert shown["changed"]["model.context_size"] == {"value": 16, "default": 64}
    assert shown["total_steps"] == 12
    program, command, config = shlex.split(shown["repeat"])
    assert (program, command, load_config(config)) == ("lumiere", "train", run.load_config())


def test_compare_puts_runs_side_by_side(run: Run, other: Run) -> None:
    compared = read_json("compare", run.id, "zzzz")
    assert compared["differences"] == {"training.max_steps": [12, 8]}
    assert compared["same_corpus"] is True
    evaluations = {line["step"]: line for line in read_metrics(run.metrics_path) if "val_loss" in line}
    assert compared["common_tokens"] == evaluations[8]["tokens"]
    for at_tokens in (reached["at_equal_tokens"] for reached in compared["runs"]):
        assert at_tokens["validation"]["loss"] == evaluations[8]["val_loss"]
    lines = [line.split() for line in run_command("compare", run.id, "zzzz").splitlines()]
    assert [run.id, "zzzzzzzz"] in lines
    assert ["training.max_steps", "12", "8"] in lines
    assert ["measured", "at", *[f"{evaluations[8]['tokens']:,}"] * 2] in lines
    other.update(corpus_sha256="another")
    assert "compare bits per byte" in invoke("compare", run.id, other.id).stderr


def test_plot_in_a_pipe_is_letters_within_the_width(run: Run, other: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (40, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        drawn = run_command("plot", run.id, "latest")
        assert drawn.replace("\n", "").isascii()
        assert max(map(len, drawn.splitlines()[:-2])) <= width
    assert drawn.splitlines()[-2:] == [
        f"a training  A validation  {run.id} on stories",
        "b training  B validation  zzzzzzzz on stories",
    ]
    first, *_, last = (line["tokens"] for line in read_metrics(run.metrics_path))
    axis = run_command("plot", run.id, "--x", "tokens").splitlines()[-3]
    assert axis.split() == [f"{first:,}", "tokens", f"{last:,}", "tokens"]
    assert re.fullmatch(r" +0:\d\d +0:\d\d", run_command("plot", run.id, "--x", "time").splitlines()[-3])


def test_plot_as_json_and_into_files(run: Run) -> None:
    (plotted,) = read_json("plot", run.id)
    losses = [line for line in read_metrics(run.metrics_path) if "loss" in line]
    assert plotted["training"]["loss"] == [line["loss"] for line in losses]
    assert plotted["training"]["tokens"] == [line["tokens"] for line in losses]
    assert plotted["validation"]["step"] == [4, 8, 12]
    Path("loss.svg").write_text("old")
    result = invoke("plot", run.id, "-o", "loss.svg")
    assert (result.stdout, result.stderr) == ("", "wrote loss.svg\n")
    assert f"{run.id} on stories" in Path("loss.svg").read_text(encoding="utf-8")


def test_tags_and_notes(run: Run) -> None:
    assert read_json("tag", run.id, "a", "b") == {"run": run.name, "tags": ["a", "b"], "note": ""}
    assert read_json("tag", run.id, "a", "--remove")["tags"] == ["b"]
    run_command("note", run.id, "a thought")
    assert read_notes(run).text == "a thought"
    assert "note  none" in run_command("note", run.id, "")


def test_rm_asks_and_says_what_goes(run: Run, other: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edit, "is_interactive", lambda: True)
    refused = invoke("rm", run.id, "latest", answer="n\n", code=1)
    assert refused.stdout == ""
    assert "Delete 2 runs, " in refused.stderr
    assert f"{run.name}  finished  best loss {run.record.best_loss:.4f}" in refused.stderr
    assert len(RunStore().all()) == 2
    invoke("rm", run.id, answer="", code=1)  # no answer is none
    invoke("rm", run.id, answer="y\n")
    assert [left.name for left in RunStore().all()] == [OTHER]


def test_rm_for_scripts(run: Run, other: Run) -> None:
    size = disk_bytes(run.path)
    expected = {"runs": [run.name], "num_bytes": size, "dry_run": True}
    assert read_json("rm", run.id, run.name, "--dry-run") == expected
    assert run.path.exists()
    assert read_json("rm", run.id, "--yes") == expected | {"dry_run": False}
    assert [left.name for left in RunStore().all()] == [OTHER]


def test_prune_keeps_the_best_and_the_latest_of_finished_runs(run: Run, other: Run) -> None:
    other.update(status="interrupted")
    before = disk_bytes(Path("runs"))
    planned = read_json("prune", "--dry-run")
    assert disk_bytes(Path("runs")) == before
    result = invoke("prune", "--yes")
    assert f"{OTHER}  skipped: it is interrupted" in result.stderr
    # The pointers are some bytes shorter.
    assert before - disk_bytes(Path("runs")) == pytest.approx(planned["num_bytes"], abs=100)
    manager = CheckpointManager()
    assert manager.names(run) == ["best", "latest"]
    assert len(manager.names(other)) > 2
    assert invoke("prune", run.id, "--yes").stdout == "nothing to delete\n"
    # Still finished, and not trained again.
    run_command("prune", run.id, "--keep", "best", "--yes")
    metrics = run.metrics_path.read_bytes()
    assert "is finished (" in commands.invoke("train", "--resume", run.id).stderr
    assert run.metrics_path.read_bytes() == metrics


OPEN = {"config", "changed", "differences", "versions"}
"""Objects whose keys are settings or packages."""


def key_paths(value: Any, path: str = "", parent: str = "") -> set[str]:
    """Where each key stands, whatever its place in a list and whatever the setting."""
    match value:
        case dict() if value:
            names = {key: "*" if parent in OPEN else key for key in value}
            return {p for key, item in value.items() for p in key_paths(item, f"{path}.{names[key]}", key)}
        case list() if value:
            return {p for item in value for p in key_paths(item, f"{path}[]", parent)}
        case _:
            return {path + "[]" * isinstance(value, list)}


COMMANDS = {
    "ls": "ls",
    "show": "show latest",
    "compare": "compare latest {}",
    "plot": "plot latest",
    "tag": "tag latest a",
    "note": "note latest text",
    "push": "push {} away",
    "pull": "pull away",
    "prune": "prune {} --yes",
    "rm": "rm {} --yes",
}


def test_the_keys_of_the_json_are_a_promise(run: Run, other: Run, golden: Callable[[str, str], str]) -> None:
    lines = []
    for name, command in COMMANDS.items():
        paths = key_paths(read_json(*command.format(run.id).split()))
        lines += [f"runs {name} {path}" for path in sorted(paths)]
    computed = "\n".join(lines) + "\n"
    assert computed == golden("json_keys.txt", computed)


def test_a_run_that_has_no_record_yet_has_the_same_keys(run: Run, other: Run) -> None:
    other.record_path.unlink()
    for command in ("ls", "show {}", "compare {} zzzz"):
        before = read_json(*command.format(run.id).split())
        entries = read_json(*command.format("zzzz" if "show" in command else run.id).split())
        match entries:
            case [empty, full] | {"runs": [full, empty]}:
                assert set(empty) == set(full)
            case _:
                assert set(entries) == set(before)


def test_a_card_takes_the_figures_that_training_recorded_and_is_replaced_only_by_force(run: Run) -> None:
    result = invoke("card", run.id)
    text = result.stdout
    assert result.stderr == ""
    assert text.startswith("---\n")
    assert f"# Lumiere {run.id}" in text
    best = run.record.best_evaluation
    assert f"| Mean batch perplexity | {best['mean_batch_perplexity']:,.2f} |" in text
    assert f"| Batches | {best['num_batches']} | of 8 windows" in text
    path = Path("README.md")
    for options in ((), ("--force",)):
        result = invoke("card", "latest", "-o", str(path), *options)
        assert (result.stdout, result.stderr) == ("", "wrote README.md\n")
        assert path.read_text(encoding="utf-8") == text
        path.write_text("mine")
    assert sorted(path.name for path in Path().iterdir()) == ["README.md", "runs"]


def test_a_card_of_an_older_run_evaluates_it_and_says_so(run: Run) -> None:
    """Before training recorded its evaluation; the second time, with only `latest` of a run killed early."""
    whole = run_command("card", run.id)
    record = run.record.to_json()
    del record["best_evaluation"], record["splits"]
    run.record_path.write_text(json.dumps(record))
    result = invoke("card", "latest")
    text = result.stdout
    assert result.stderr.splitlines() == [f"run {run.id} has no evaluation of checkpoint best; evaluating it now"]
    first, second = (page.split("## Validation results")[1].split("\n## ")[0] for page in (text, whole))
    assert first == second
    remove_pointers(run, "best")
    text = run_command("card", "latest")
    assert "checkpoint `latest` (step 12)" in text
    assert f'load_checkpoint("{run.name}", "latest")' in text
