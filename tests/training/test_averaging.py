"""The average of the weights: its recurrence by hand, and what is evaluated, saved and gone on with."""

import math

import pytest
import torch
from torch import nn

from lumiere.errors import CheckpointError
from lumiere.evaluation.loss import evaluate
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.training.events import EvaluationEvent, Event, StepEvent
from lumiere.training.optim import WeightAverage
from lumiere.training.run import newest_checkpoint
from lumiere.training.setup import set_up
from lumiere.training.state import TrainingState, new_model

DECAY = 0.25
AVERAGED = {"training.ema_decay": DECAY, "training.learning_rate": 1e-2, "training.warmup_steps": 0}


def test_the_average_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(8.0)
    average = WeightAverage(model, decay=0.25)
    expected = 8.0
    for step, weight in enumerate([4.0, -2.0, 1.0, 0.0], start=1):
        model.weight.data.fill_(weight)
        average.update(step)
        # 2/11, then 3/12 and more, of which a quarter is the most.
        decay = {1: 2 / 11}.get(step, 0.25)
        expected = decay * expected + (1 - decay) * weight
        assert average.tensors()["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 0.0, "averaging leaves the weights alone"


def test_a_young_average_forgets_where_it_began() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, decay=0.9999)
    model.weight.data.fill_(0.0)
    for step in range(1, 101):
        average.update(step)
    # Of the product of (1 + t) / (10 + t), nine factors are left at either end.
    left = math.prod(range(2, 11)) / math.prod(range(102, 111))
    assert average.tensors()["weight"].item() == pytest.approx(left, rel=1e-3)


def test_it_is_applied_inside_and_taken_back_also_after_an_error() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, decay=0.5)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with torch.no_grad():
        model.weight.add_(1.0)
    with average.applied():
        assert torch.equal(model.weight, before["weight"])
    assert torch.equal(model.weight, before["weight"] + 1.0)
    with pytest.raises(ZeroDivisionError), average.applied():
        1 // 0  # noqa: B018
    assert torch.equal(model.weight, before["weight"] + 1.0)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_the_average_is_what_is_evaluated_and_saved(configure, launch) -> None:
    config = configure(AVERAGED | {"training.eval_interval": 2})
    events: list[Event] = []
    trained: list[dict[str, torch.Tensor]] = []

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepEvent):
            trained.append({name: weight.clone() for name, weight in states[0].model.state_dict().items()})

    states: list[TrainingState] = []
    around = TrainingState.around
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "around", lambda *given: states.append(around(*given)) or states[0])
        run = launch(config, [listen]).run

    with torch.random.fork_rng():
        expected = {name: weight.double() for name, weight in new_model(config).state_dict().items()}
    for step, weights in enumerate(trained, start=1):
        decay = min(DECAY, (1 + step) / (10 + step))
        expected = {name: decay * average + (1 - decay) * weights[name] for name, average in expected.items()}
    latest = CheckpointManager(run.path.parent).load(run, "latest")
    assert len(trained) == 6
    for name, average in expected.items():
        torch.testing.assert_close(latest.model[name].double(), average, rtol=1e-5, atol=1e-7)
        assert torch.equal(latest.optimizer[f"trained.{name}"], trained[-1][name])
    # A snapshot is of the weights that training went through, not of their average.
    snapshot = CheckpointManager(run.path.parent).load(run, "4")
    assert all(torch.equal(snapshot.model[name], weight) for name, weight in trained[3].items())

    told = [event.evaluation.loss for event in events if isinstance(event, EvaluationEvent)]
    corpus = set_up(config).corpus
    facts = corpus.splits["validation"].facts
    scored = evaluate(run.load_model("latest"), corpus.windows("validation", config), facts, config.training.batch_size)
    assert scored.loss == pytest.approx(told[-1], rel=1e-6)


def test_averaging_changes_no_step(configure, launch, tensor_hashes) -> None:
    with_average, without = (launch(configure(AVERAGED | {"training.ema_decay": decay})).run for decay in (DECAY, None))
    hashes = tensor_hashes(with_average, "latest")
    trained = {
        name.replace("optimizer.trained.", "model."): value for name, value in hashes.items() if "trained" in name
    }
    alone = tensor_hashes(without, "latest")
    assert trained == {name: value for name, value in alone.items() if name.startswith("model.")}


def test_with_and_without_an_average_do_not_go_on_from_each_other(configure, launch) -> None:
    averaged, plain = configure(AVERAGED), configure(AVERAGED | {"training.ema_decay": None})
    for trained, other in ((averaged, plain), (plain, averaged)):
        checkpoint, _ = newest_checkpoint(launch(trained).run)
        assert checkpoint is not None
        with pytest.raises(CheckpointError, match="does not fit the run"):
            TrainingState.create(other, torch.device("cpu")).restore(checkpoint)
