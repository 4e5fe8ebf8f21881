"""Every handmade model computes its task: on all inputs where there are few, else on many."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lumiere.errors import LumiereError
from lumiere.lab.circuits import (
    ASK,
    BOS,
    BRACKETS,
    CLOSE,
    COUNTED,
    COUNTED_LENGTH,
    DIGITS,
    FROM,
    LETTERS,
    LOGIT,
    NO,
    NUMBERS,
    OPEN,
    REPEATED,
    REVERSED,
    SEPARATOR,
    SORT,
    SORTED,
    TASKS,
    TO,
    YES,
    KnownCircuit,
    known_circuit,
)


@pytest.fixture(scope="module")
def circuits() -> dict[str, KnownCircuit]:
    return {name: known_circuit(name, pairs=8, seed=1) for name in TASKS}


def logits_of(circuit: KnownCircuit, prompts: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return circuit.model.logits(torch.tensor(prompts))


def orders(values: range, size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[values[i] for i in torch.randperm(len(values), generator=generator)[:size]] for _ in range(200)]


@pytest.mark.parametrize("name", ["induction", "redundant"])
def test_induction_copies_what_followed(circuits: dict[str, KnownCircuit], name: str) -> None:
    prompts = [[BOS, *letters, *letters] for letters in orders(range(1, LETTERS + 1), REPEATED)]
    predicted = logits_of(circuits[name], prompts).argmax(-1)
    answers = torch.tensor(prompts)[:, REPEATED + 2 :]
    assert torch.equal(predicted[:, REPEATED + 1 : -1], answers)


def test_reverse_reverses(circuits: dict[str, KnownCircuit]) -> None:
    words = [list(word) for word in itertools.product((1, 4, SEPARATOR - 1), repeat=REVERSED)]
    prompts = [[BOS, *word, SEPARATOR, *reversed(word)] for word in words]
    predicted = logits_of(circuits["reverse"], [prompt[:-1] for prompt in prompts]).argmax(-1)
    assert torch.equal(predicted[:, -REVERSED:], torch.tensor(prompts)[:, -REVERSED:])


def test_proportion_is_the_share_so_far(circuits: dict[str, KnownCircuit]) -> None:
    prompts = [[BOS, *rest] for rest in itertools.product((COUNTED, 2, 4), repeat=6)]
    assert len(prompts[0]) <= COUNTED_LENGTH
    logits = logits_of(circuits["proportion"], prompts)
    shares = [[prompt[: end + 1].count(COUNTED) / (end + 1) for end in range(7)] for prompt in prompts]
    assert ((logits[..., COUNTED] - logits[..., BOS]) / LOGIT - torch.tensor(shares)).abs().max() < 1e-2


def test_sort_sorts(circuits: dict[str, KnownCircuit]) -> None:
    drawn = orders(range(2, NUMBERS + 2), SORTED)
    prompts = [[BOS, *numbers, SORT, *sorted(numbers)] for numbers in drawn]
    predicted = logits_of(circuits["sort"], prompts).argmax(-1)
    assert torch.equal(predicted[:, SORTED + 1 : -1], torch.tensor(prompts)[:, SORTED + 2 :])


def balanced_words(pairs: int) -> Iterator[str]:
    """All balanced words, by their grammar: `( A ) B`."""
    if pairs == 0:
        yield ""
    for inner in range(pairs):
        for first, second in itertools.product(balanced_words(inner), balanced_words(pairs - 1 - inner)):
            yield f"({first}){second}"


def test_brackets_are_judged(circuits: dict[str, KnownCircuit]) -> None:
    words = ["".join(word) for word in itertools.product("()", repeat=BRACKETS)]
    balanced = set(balanced_words(BRACKETS // 2))
    prompts = [[BOS, *(OPEN if bracket == "(" else CLOSE for bracket in word), ASK] for word in words]
    predicted = logits_of(circuits["brackets"], prompts)[:, -1].argmax(-1)
    assert predicted.tolist() == [YES if word in balanced else NO for word in words]


def test_greater_than_allows_the_digits_above(circuits: dict[str, KnownCircuit]) -> None:
    prompts = [[BOS, FROM, digit, TO] for digit in range(1, DIGITS + 1)]
    logits = logits_of(circuits["greater-than"], prompts)[:, -1]
    allowed = [[DIGITS >= token > digit for token in range(TO + 1)] for digit in range(1, DIGITS + 1)]
    assert (logits / LOGIT - torch.tensor(allowed).float()).abs().max() < 1e-2


@pytest.mark.parametrize("name", TASKS)
def test_pairs_go_from_a_right_to_a_wrong_answer(circuits: dict[str, KnownCircuit], name: str) -> None:
    circuit = circuits[name]
    rows = torch.arange(len(circuit.clean))
    clean, corrupt = (logits_of(circuit, tokens.tolist())[rows, circuit.positions] for tokens in
                      (circuit.clean, circuit.corrupt))  # fmt: skip
    gaps = [(logits[rows, circuit.targets] - logits[rows, circuit.versus]).double() for logits in (clean, corrupt)]
    assert gaps[0].min() > 0.1 * LOGIT
    assert (gaps[0] - gaps[1]).min() > 0.1 * LOGIT


@pytest.mark.parametrize("name", TASKS)
def test_seeds_give_other_places_for_the_same_circuit(name: str) -> None:
    """The parts of a layer change places, and the weights change with the basis: the shape of the graph does not."""
    circuits = [known_circuit(name, pairs=1, seed=seed) for seed in range(4)]
    assert len({circuit.edges for circuit in circuits}) > 1
    assert len({len(circuit.edges) for circuit in circuits}) == 1
    weights = [circuit.model.token_embedding.weight for circuit in circuits]
    assert not torch.allclose(weights[0], weights[1])
    assert all((circuit.model.token_embedding.weight.abs() < 1e-6).float().mean() < 0.1 for circuit in circuits)


def test_a_task_of_another_name() -> None:
    with pytest.raises(LumiereError):
        known_circuit("indcution")
