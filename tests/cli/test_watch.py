"""Watching a training that a test plays: each look of the watcher is one turn of the play."""

import io
import json
from collections.abc import Callable

import pytest
from rich.console import Console

from lumiere.cli.runs import watch
from lumiere.cli.runs.watch import Watched
from lumiere.persistence import liveness
from lumiere.persistence.metrics import MetricsWriter, truncate_metrics
from lumiere.persistence.runs import Run, RunStore
from tests.cli.commands import invoke, refuse, stdout_of


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(liveness, "is_alive", lambda folder, record: True)  # the process of the play is alive
    run = RunStore().create()
    run.update(status="running", total_steps=40)
    return run


def training(run: Run, *steps: int) -> None:
    with MetricsWriter(run.metrics_path) as writer:
        for step in steps:
            writer.write({"step": step, "tokens": 9 * step, "time": step / 2, "loss": 8.0, "tokens_per_second": 18.0})


def evaluation(run: Run, step: int) -> None:
    with MetricsWriter(run.metrics_path) as writer:
        writer.write({"step": step, "tokens": 9 * step, "time": step / 2, "val_loss": 7.5, "val_perplexity": 1808.04})


def play(monkeypatch: pytest.MonkeyPatch, *turns: Callable[[], object]) -> None:
    """What happens between the looks; more looks than turns are an error."""
    remaining = iter(turns)
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: next(remaining)())


def watched_lines(run: Run, *options: str) -> list[str]:
    return stdout_of("runs", "watch", run.id, *options).splitlines()


def test_lines_come_once_and_it_ends_with_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    training(run, 10, 20)

    def finish() -> None:
        evaluation(run, 40)
        run.update(status="finished")

    play(monkeypatch, lambda: None, lambda: training(run, 30), finish)
    assert watched_lines(run) == [
        "step 20/40  loss 8.000  18 tok/s  0:10 left",
        "step 30/40  loss 8.000  18 tok/s  0:05 left",
        "step 40/40  validation loss 7.5000  perplexity 1,808.04",
        f"{run.name} is finished",
    ]


def test_a_resume_that_cuts_the_metrics_is_followed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    training(run, 10, 20, 30)
    play(
        monkeypatch,
        lambda: (truncate_metrics(run.metrics_path, 10), training(run, 20, 25, 30, 35)),
        lambda: run.update(status="interrupted"),
    )
    *lines, last = [json.loads(line) for line in watched_lines(run, "--json")]
    assert [line["step"] for line in lines] == [30, 10, 20, 25, 30, 35]
    assert lines[1:] == [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert last == {"run": run.name, "status": "interrupted"}


def test_a_run_that_was_just_made_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "is_alive", lambda folder, record: True)
    run = RunStore().create()
    play(
        monkeypatch,
        lambda: run.update(status="running"),
        lambda: training(run, 10, 20),
        lambda: run.update(status="finished"),
    )
    lines = ["step 10  loss 8.000  18 tok/s", "step 20  loss 8.000  18 tok/s"]
    assert watched_lines(run) == [*lines, f"{run.name} is finished"]


def test_a_run_without_a_status_is_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunStore().create()
    play(monkeypatch, *[lambda: None] * 4)
    assert watched_lines(run) == [f"{run.name} is unknown"]


def test_a_run_that_is_deleted_is_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, lambda: run.path.rename("elsewhere"))
    assert refuse("runs", "watch", run.id)[0] == f"error: run {run.id} is gone"


def test_ctrl_c_leaves(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    play(monkeypatch, interrupt)
    invoke("runs", "watch", run.id, code=130)


def test_the_view_shows_the_newest_figures_within_the_width(run: Run) -> None:
    training(run, *range(1, 31))
    evaluation(run, 30)
    run.update(best_loss=7.25)
    watched = Watched(run)
    watched.look()
    screen = io.StringIO()
    Console(width=80, file=screen).print(watch.view(watched))
    lines = screen.getvalue().splitlines()
    assert lines[0] == f"{run.name}  running"
    assert lines[1] == "step 30/40  loss 8.000  18 tok/s  validation 7.5000  best 7.2500  0:05 left"
    assert max(map(len, lines)) <= 80
    assert "step 1" in lines[-2]
    assert "A validation" in lines[-1]


def test_a_record_of_any_type_is_shown(run: Run) -> None:
    for value in (None, "x", [], True, 2**62, -5, 0):
        run.record_path.write_text(json.dumps({"status": "finished", "total_steps": value, "best_loss": value}))
        line = {"step": 0, "time": value, "loss": value, "val_perplexity": value}
        run.metrics_path.write_text(json.dumps(line) + "\n")
        assert len(watched_lines(run)) == 2
