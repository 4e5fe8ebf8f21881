"""`lumiere.open` and `lumiere.train`, and what a light `import lumiere` loads."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lumiere
from lumiere.config.schema import RunConfig
from lumiere.generation.decoding import Limits
from lumiere.generation.sampling import Sampling
from lumiere.generation.text import TextGenerator
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run
from lumiere.training.events import EvaluationEvent, Event, StepEvent


@pytest.fixture
def run(trained_run: Run) -> lumiere.OpenedRun:
    return lumiere.open(trained_run.path)


def test_references_name_the_same_run(trained_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path, name = trained_run.path, trained_run.name
    for reference in (name, trained_run.id, trained_run.id[:4], "latest"):
        assert lumiere.open(reference, runs_dir=path.parent).run == trained_run
    for reference in (path, str(path), f"{path}/"):
        assert lumiere.open(reference).run == trained_run
    monkeypatch.setenv("LUMIERE_RUNS_DIR", str(path.parent))
    assert lumiere.open("latest@4").step == lumiere.open(f"{path}@4").step == lumiere.open(name, 4).step == 4
    assert lumiere.open().at("latest").step == 12


@pytest.mark.parametrize(
    "arguments", [("zzz",), ("latest", "bset"), ("latest@7",), ("latest@",), ("runs/x",), ("latest", "best", "cuda:9")]
)
def test_what_does_not_exist_is_refused_when_opening(arguments: tuple[str, ...], trained_run: Run) -> None:
    reference, *more = arguments
    with pytest.raises(lumiere.LumiereError):
        lumiere.open(reference, *more[:1], runs_dir=trained_run.path.parent, device=(more[1:] or ["cpu"])[0])


def test_model_config_and_metrics_are_those_of_the_run(trained_run: Run, run: lumiere.OpenedRun) -> None:
    tokens = torch.arange(3, 13)[None]
    assert torch.equal(run.model(tokens).logits, trained_run.load_model("best")(tokens).logits)
    assert run.config == trained_run.load_config()
    assert run.tokenizer.fingerprint == trained_run.load_tokenizer().fingerprint
    lines = [json.loads(line) for line in trained_run.metrics_path.read_text().splitlines()]
    assert run.metrics == lines
    frame = run.metrics_frame()
    assert frame["step"].tolist() == [line["step"] for line in lines]
    assert frame["val_loss"].dropna().tolist() == [line["val_loss"] for line in lines if "val_loss" in line]


def test_a_run_that_was_not_saved_yet_has_no_model(trained_run: Run, tmp_path: Path) -> None:
    copy = shutil.copytree(trained_run.path, tmp_path / "copy" / trained_run.name)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(lumiere.LumiereError, match="has no checkpoint"):
        lumiere.open(copy)


def test_a_generated_text_is_that_of_the_generator(trained_run: Run, run: lumiere.OpenedRun) -> None:
    found = run.generate("Once upon", max_new_tokens=8, seed=3, top_k=5)
    generator = TextGenerator.open(str(trained_run.id), runs_dir=trained_run.path.parent)
    expected = generator.write("Once upon", Sampling(0.8, 5), Limits(8, (), 0), seed=3)
    assert found.generation == expected
    assert str(found) == "Once upon" + expected.text
    probabilities = [f"{math.exp(token.logprob):.1%}" for token in found.tokens]
    assert [found._repr_html_().count(f'title="{each}"') for each in probabilities] == [
        probabilities.count(each) for each in probabilities
    ]
    assert run.generate(temperature=0, max_new_tokens=2).seed is None
    again = run.generate("Once", max_new_tokens=6)
    assert run.generate("Once", max_new_tokens=6, seed=again.seed).text == again.text


def test_activations_of_a_generated_text_are_those_of_a_forward_pass(run: lumiere.OpenedRun) -> None:
    found = run.generate("Once", max_new_tokens=8, seed=3, names=["*.hook_resid_post", "*.hook_pattern"])
    assert found.text == run.generate("Once", max_new_tokens=8, seed=3).text
    expected = run.inspect.cache(found.read, names=["*.hook_resid_post", "*.hook_pattern"]).values
    assert found.activations.keys() == expected.keys()
    for name, activation in found.activations.items():
        np.testing.assert_allclose(activation, expected[name], atol=1e-4)
    assert run.generate("Once", max_new_tokens=1).activations == {}


def test_an_evaluation_is_the_one_that_training_recorded(trained_run: Run, run: lumiere.OpenedRun) -> None:
    found = run.evaluate(baselines=False)
    assert found.loss == pytest.approx(trained_run.record.best_loss, rel=1e-5)
    assert not (trained_run.path / "eval").exists()
    found.save("score.json")
    assert json.loads(Path("score.json").read_text())["loss"] == found.values["loss"] == found.loss
    found.save("score.svg")
    assert "<svg" in found._repr_html_()


def test_texts_and_files_are_scored_alike(run: lumiere.OpenedRun) -> None:
    Path("a.txt").write_text("Once upon a time.")
    as_text, as_file = run.evaluate(text="Once upon a time."), run.evaluate(file="a.txt")
    assert as_text.loss == as_file.loss
    assert as_text.about["corpus_sha256"] == as_file.about["corpus_sha256"]
    one: list[dict[str, Any]] = [{"split": "tset"}, {"text": " "}]
    two: list[dict[str, Any]] = [{"text": "a", "file": "a.txt"}, {"text": "a", "split": "test"}]
    for arguments in (*one, *two):
        with pytest.raises(lumiere.LumiereError):
            run.evaluate(**arguments)


def test_missing_baselines_are_noted(run: lumiere.OpenedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "record", RunRecord(corpus_sha256="another"))
    found = run.evaluate(text="Once upon a time.")
    assert found.baselines is None
    assert "skipping baselines" in found.notes[0]


def test_training_from_python(tiny_config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = []
    run = lumiere.train(tiny_config, {"model.d_ff": 16}, max_steps=3, seed=5, callbacks=[events.append])
    assert (run.config.model.d_ff, run.config.training.seed, run.step, run.record.status) == (16, 5, 3, "finished")
    assert run.config.training.batch_size == tiny_config.training.batch_size
    evaluations = [event.evaluation.loss for event in events if isinstance(event, EvaluationEvent)]
    assert evaluations == [record["val_loss"] for record in run.metrics if "val_loss" in record]
    assert "".join(capsys.readouterr()) == ""
    again = lumiere.train(run.config.model_dump(), runs_dir="others")
    assert again.path.parent == Path("others")
    assert all(torch.equal(*pair) for pair in zip(again.model.parameters(), run.model.parameters(), strict=True))


def test_fine_tuning_from_python(tiny_config: RunConfig, trained_run: Run) -> None:
    shutil.copytree(trained_run.path, Path("runs") / trained_run.name)
    given = {"dataset": tiny_config.dataset.model_dump() | {"num_documents": 12}, "training": {"max_steps": 2}}
    run = lumiere.train(given, {"training.device": "cpu"}, start_from=f"{trained_run.id}@4")
    assert (run.record.parent["run"], run.record.parent["step"]) == (trained_run.name, 4)
    started, parent = run.at(0).model.state_dict(), lumiere.open(trained_run.path, 4).model.state_dict()
    assert all(torch.equal(started[name], weight) for name, weight in parent.items())


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"model.num_layer": 3}, {}), ({}, {"max_stps": 3}), ({"training.max_steps": "many"}, {}), ({"model": 3}, {})],
)
def test_wrong_settings_make_no_run(tiny_config: RunConfig, settings: dict[str, Any], named: dict[str, Any]) -> None:
    with pytest.raises(lumiere.LumiereError):
        lumiere.train(tiny_config, settings, **named)
    with pytest.raises(lumiere.LumiereError):
        lumiere.train("tinny")
    assert not Path("runs").exists()


def test_an_interrupt_saves_and_is_raised(tiny_config: RunConfig) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, StepEvent):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="lumiere train --resume"):
        lumiere.train(tiny_config, callbacks=[interrupt])
    interrupted = lumiere.open("latest")
    assert (interrupted.step, interrupted.record.status) == (2, "interrupted")
    steps: list[int] = []
    resumed = interrupted.resume(callbacks=[lambda event: steps.append(event.step)])
    assert (resumed.record.status, min(steps)) == ("finished", 2)
    whole = lumiere.train(tiny_config)
    assert resumed.at("latest").step == whole.at("latest").step
    first, second = (run.at("latest").model.parameters() for run in (resumed, whole))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_finished_run_is_resumed_only_to_extend_it(tiny_config: RunConfig) -> None:
    run = lumiere.train(tiny_config, {"training.schedule": "constant"}, max_steps=2)
    assert (run.resume().step, len(run.record.resumes)) == (2, 0)
    longer = run.resume(max_steps=3)
    assert (longer.at("latest").step, longer.config.training.max_steps) == (3, 3)
    with pytest.raises(lumiere.LumiereError, match="seed"):
        run.resume(seed=5)
    run.run.update(status="imported")
    with pytest.raises(lumiere.LumiereError):
        run.resume()


def test_importing_lumiere_loads_nothing() -> None:
    script = """
import lumiere, sys
assert {"open", "train", "LumiereError"} <= set(dir(lumiere))
assert not {"torch", "numpy", "yaml", "lumiere.api", "lumiere.errors"} & sys.modules.keys()
try:
    lumiere.opn
except AttributeError as error:
    assert "opn" in str(error)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert {name: getattr(lumiere, name) for name in dir(lumiere)}["open"] is lumiere.open
