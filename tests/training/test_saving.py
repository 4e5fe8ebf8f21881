"""What a run's record keeps of its training."""

from dataclasses import asdict

import pytest

from lumiere.evaluation.loss import Evaluation
from lumiere.training import trainer
from lumiere.training.events import EvaluationEvent, Event


def test_the_record_keeps_the_best_evaluation_whole(configure, launch, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5])

    def evaluate(*arguments: object) -> Evaluation:
        loss = next(losses)
        return Evaluation(loss, 2 * loss, 3 * loss, 4 * loss, 5 * loss, 6 * loss, 1000, 80, 3, 32, 0.5)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    events: list[Event] = []
    record = launch(configure({"training.eval_interval": 2, "training.max_steps": 5}), [events.append]).run.record
    scored = [event for event in events if isinstance(event, EvaluationEvent)]
    assert [(event.step, event.is_best) for event in scored] == [(2, True), (4, True), (5, False)]
    assert record.best_evaluation == {"step": 4} | asdict(scored[1].evaluation)
    assert record.best_evaluation["word_perplexity"] == 12.0
    assert record.best_step == 4


def test_the_record_says_how_much_text_each_split_has(configure, launch, tiny_corpus) -> None:
    config = configure({"dataset.num_documents": 10, "dataset.seed": 0})
    splits = launch(config).run.record.splits
    assert list(splits) == ["train", "validation", "test"]
    train = tiny_corpus.splits["train"]
    assert splits["train"]["num_documents"] == 10
    assert splits["train"]["num_tokens"] == len(train.ids)
    assert splits["train"]["sha256"] == train.facts.sha256
