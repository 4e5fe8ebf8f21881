"""Models that compute a task by a circuit that is known, with pairs of prompts that show it.

In every pair the corrupt prompt runs the same model to another answer. Single edges of each circuit matter, except in
`redundant`, where two heads do the same work.

Shapes: B pairs, T position, Vocab vocab_size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lumiere.errors import check_choice
from lumiere.lab.compiler import Compiled, Edge, compile_program
from lumiere.lab.program import Aggregate, Indices, Tokens, attend, average, piecewise, select, table
from lumiere.models.transformer import Transformer

SHARPNESS = 15.0
"""By how much the score of what a head looks for exceeds that of everything else: exp(-15) is 3e-7."""
LOGIT = 10.0
"""The logit of the answer; that of the others is 0."""
BOS = 0
"""The first token of every prompt, so that there is something to attend to."""


@dataclass(frozen=True)
class KnownCircuit:
    """A task, the model that computes it, and the edges by which it does.

    Attributes:
        name: Of the task.
        model: In evaluation mode, float64.
        edges: The circuit, where parts are ablated by what they write on the corrupt prompt: (writer, reader).
        written: These, and the edges that carry only positions, whose ablation changes nothing.
        clean, corrupt: (B, T) token ids.
        positions: (B,) where the answer is read.
        targets: (B,) the answer of the clean prompt.
        versus: (B,) a wrong answer. The metric is the logit of the target minus that of this one.
    """

    name: str
    model: Transformer
    edges: tuple[Edge, ...]
    written: tuple[Edge, ...]
    clean: Tensor
    corrupt: Tensor
    positions: Tensor
    targets: Tensor
    versus: Tensor


@dataclass(frozen=True)
class Pair:
    """Two prompts of one length, where the answer is read, the answer, and a wrong one."""

    clean: list[int]
    corrupt: list[int]
    position: int
    target: int
    versus: int


class Dice:
    """Seeded draws."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def shuffled(self, values: list[int]) -> list[int]:
        return [values[i] for i in torch.randperm(len(values), generator=self.generator)]

    def integer(self, first: int, stop: int) -> int:
        return int(torch.randint(first, stop, (), generator=self.generator))

    def integers(self, first: int, stop: int, count: int) -> list[int]:
        return [self.integer(first, stop) for _ in range(count)]


def until(draw: Callable[[], Pair | None]) -> Pair:
    """Draw until there is a pair."""
    while (pair := draw()) is None:
        pass
    return pair


@dataclass(frozen=True)
class Task:
    """How a circuit is built, and how its prompts are drawn.

    Attributes:
        build: Takes sharpness and seed.
        draw: Returns a pair, or None if the draw is no use.
    """

    build: Callable[[float, int], Compiled]
    draw: Callable[[Dice], Pair | None]


def one_hot_logits(size: int) -> Tensor:
    return LOGIT * torch.eye(size)


# Induction: after [a, b, ..., a] comes b. Tokens 1 to 12.
LETTERS, REPEATED = 12, 6


def build_induction(sharpness: float, seed: int, copies: int = 1) -> Compiled:
    tokens, indices = Tokens(LETTERS + 1), Indices(2 * REPEATED + 1)
    before = [(i, i - 1) for i in range(1, indices.width)]
    previous = tuple(attend(indices, before, tokens, 2 * sharpness) for _ in range(copies))
    match = torch.eye(tokens.width) * sharpness
    output = Aggregate(tokens.width, tokens, None, (tokens,), previous, match)
    return compile_program(output, one_hot_logits(tokens.width), None, indices.width, seed=seed)


def draw_induction(dice: Dice) -> Pair | None:
    letters = dice.shuffled(list(range(1, LETTERS + 1)))[:REPEATED]
    first, second = dice.shuffled(letters), dice.shuffled(letters)
    at = dice.integer(0, REPEATED - 1)
    asked = first.index(second[at])
    clean, corrupt = [BOS, *letters, *letters], [BOS, *first, *second]
    answer = [*first, *second][asked + 1]
    is_useful = answer != letters[at + 1] and all(x != y for x, y in zip(letters, first, strict=True))
    return Pair(clean, corrupt, REPEATED + 1 + at, letters[at + 1], answer) if is_useful else None


def draw_redundant(dice: Dice) -> Pair:
    """The letters of the corrupt prompt are others, so that a head that reads them finds no match."""
    letters = dice.shuffled(list(range(1, LETTERS + 1)))
    clean, corrupt = letters[:REPEATED], letters[REPEATED:]
    at = dice.integer(0, REPEATED - 1)
    return Pair([BOS, *clean * 2], [BOS, *corrupt * 2], REPEATED + 1 + at, clean[at + 1], corrupt[at + 1])


# Reverse: after [x1, ..., xn, SEP] come xn, ..., x1. Tokens 1 to 8; 9 is SEP.
REVERSED, SEPARATOR = 5, 9


def build_reverse(sharpness: float, seed: int) -> Compiled:
    tokens, indices = Tokens(SEPARATOR + 1), Indices(2 * REVERSED + 1)
    mirror = [(i, 2 * REVERSED + 1 - i) for i in range(REVERSED + 1, indices.width)]
    output = attend(indices, mirror, tokens, sharpness)
    return compile_program(output, one_hot_logits(tokens.width), None, indices.width, seed=seed)


def draw_reverse(dice: Dice) -> Pair | None:
    clean, corrupt = (dice.integers(1, SEPARATOR, REVERSED) for _ in range(2))
    at = dice.integer(0, REVERSED)
    target, versus = clean[-1 - at], corrupt[-1 - at]
    right, wrong = ([BOS, *word, SEPARATOR, *reversed(word)][: 2 * REVERSED + 1] for word in (clean, corrupt))
    return Pair(right, wrong, REVERSED + 1 + at, target, versus) if target != versus else None


# Proportion: the logit of token 1, less that of BOS, is 10 times the share of token 1 among the tokens so far.
COUNTED, KINDS, COUNTED_LENGTH = 1, 5, 10


def build_proportion(sharpness: float, seed: int) -> Compiled:
    """Without scores; `sharpness` has no meaning here."""
    tokens = Tokens(KINDS)
    indicator = torch.zeros(KINDS, 1)
    indicator[COUNTED] = 1.0
    readout = torch.zeros(KINDS, 1)
    readout[COUNTED] = LOGIT
    return compile_program(average(table(tokens, indicator)), readout, None, COUNTED_LENGTH, seed=seed)


def draw_proportion(dice: Dice) -> Pair | None:
    clean, corrupt = ([BOS, *dice.integers(1, KINDS, COUNTED_LENGTH - 1)] for _ in range(2))
    is_useful = clean.count(COUNTED) >= corrupt.count(COUNTED) + 2
    return Pair(clean, corrupt, COUNTED_LENGTH - 1, COUNTED, BOS) if is_useful else None


# Sort: after distinct numbers and SORT come the numbers in order. Token 1 is SORT, 2 to 11 are the numbers.
SORT, NUMBERS, SORTED = 1, 10, 4


def build_sort(sharpness: float, seed: int) -> Compiled:
    """The next number is the smallest above the current token; SORT is below all numbers."""
    tokens = Tokens(NUMBERS + 2)
    rank = torch.arange(tokens.width)
    above = (rank - rank[:, None]).double()
    scores = torch.where(above > 0, -sharpness * above, -sharpness * tokens.width)
    scores[:, [BOS, SORT]] = -sharpness * tokens.width
    output = select(tokens, tokens, scores.float(), tokens)
    return compile_program(output, one_hot_logits(tokens.width), None, 2 * SORTED + 2, seed=seed)


def draw_sort(dice: Dice) -> Pair | None:
    numbers = [dice.shuffled(list(range(2, NUMBERS + 2)))[:SORTED] for _ in range(2)]
    at = dice.integer(0, SORTED)
    clean, corrupt = ([BOS, *drawn, SORT, *sorted(drawn)][: 2 * SORTED + 2] for drawn in numbers)
    target, versus = (sorted(drawn)[at] for drawn in numbers)
    return Pair(clean, corrupt, SORTED + 1 + at, target, versus) if target != versus else None


# Brackets: are those before the question mark balanced? Tokens: ( ) ? yes no.
OPEN, CLOSE, ASK, YES, NO, BRACKETS = 1, 2, 3, 4, 5, 8


def build_brackets(sharpness: float, seed: int) -> Compiled:
    """Without scores; `sharpness` has no meaning here.

    The first head computes the share of opening minus closing brackets so far, f. The feed-forward part after it marks
    where f is negative, and the second head computes the share of such positions, g. The brackets are balanced if f
    and g are both 0 at the end, which is where f + T g is 0, as f is above -1 and g, if not 0, at least 1 / T.
    """
    size = BRACKETS + 2
    tokens = Tokens(NO + 1)
    direction = torch.zeros(tokens.width, 1)
    direction[OPEN], direction[CLOSE] = 1.0, -1.0
    depth = average(tokens, direction)
    is_negative = piecewise([depth], [-2.0 * size], [(0.0, 1.0), (1.0, -1.0)])
    balanced = piecewise(
        [depth, average(is_negative)], [2.0 * size, 2.0 * size**2], [(-1.0, 1.0), (0.0, -2.0), (1.0, 1.0)]
    )
    readout, offset = torch.zeros(tokens.width, 1), torch.zeros(tokens.width)
    readout[YES], readout[NO], offset[YES], offset[NO] = LOGIT, -LOGIT, 0.0, LOGIT
    return compile_program(balanced, readout, offset, size, seed=seed)


def draw_brackets(dice: Dice) -> Pair | None:
    clean, corrupt = ([BOS, *dice.integers(OPEN, CLOSE + 1, BRACKETS), ASK] for _ in range(2))
    # One corrupt prompt in two has as many opening as closing brackets, and is unbalanced all the same.
    has_equal_counts = dice.integer(0, 2) == 0
    is_useful = is_balanced(clean) and not is_balanced(corrupt)
    is_useful = is_useful and has_equal_counts == (corrupt.count(OPEN) == corrupt.count(CLOSE))
    return Pair(clean, corrupt, BRACKETS + 1, YES, NO) if is_useful else None


def is_balanced(prompt: list[int]) -> bool:
    """Return whether no bracket closes before it opens, and none stays open."""
    depth = 0
    for token in prompt:
        depth += (token == OPEN) - (token == CLOSE)
        if depth < 0:
            return False
    return depth == 0


# Greater than: after [BOS, FROM, y, TO] comes a digit above y. Tokens 1 to 10 are the digits 0 to 9.
DIGITS, FROM, TO = 10, 11, 12


def build_greater_than(sharpness: float, seed: int) -> Compiled:
    tokens, indices = Tokens(TO + 1), Indices(4)
    copied = attend(indices, [(3, 2)], tokens, sharpness)
    digits = torch.arange(1, DIGITS + 1)
    above = torch.zeros(tokens.width, DIGITS)
    above[digits] = (digits > digits[:, None]).float()
    readout = torch.zeros(tokens.width, DIGITS)
    readout[digits] = LOGIT * torch.eye(DIGITS)
    return compile_program(table(copied, above), readout, None, indices.width, seed=seed)


def draw_greater_than(dice: Dice) -> Pair | None:
    """The target is above the clean digit and not above the corrupt one; the other answer is above neither."""
    clean, corrupt = dice.integers(1, DIGITS + 1, 2)
    if clean >= corrupt:
        return None
    target, versus = dice.integer(clean + 1, corrupt + 1), dice.integer(1, clean + 1)
    return Pair([BOS, FROM, clean, TO], [BOS, FROM, corrupt, TO], 3, target, versus)


TASKS: Mapping[str, Task] = {
    "induction": Task(build_induction, draw_induction),
    "reverse": Task(build_reverse, draw_reverse),
    "proportion": Task(build_proportion, draw_proportion),
    "sort": Task(build_sort, draw_sort),
    "brackets": Task(build_brackets, draw_brackets),
    "greater-than": Task(build_greater_than, draw_greater_than),
    "redundant": Task(partial(build_induction, copies=2), draw_redundant),
}
"""By name. Single ablation finds all edges of each but the last."""


def known_circuit(name: str, pairs: int = 32, sharpness: float = SHARPNESS, seed: int = 0) -> KnownCircuit:
    """Return the model of a task, its circuit, and pairs of prompts.

    Args:
        name: Of `TASKS`.
        pairs: B.
        sharpness: By how much the score of what a head looks for exceeds others, where the heads have scores. The
            gradient of a sharp pattern is almost 0.
        seed: Of the idle weights, the order of the heads, the basis of the stream, and the prompts.

    Raises:
        LumiereError: There is no such task.
    """
    check_choice("task", name, TASKS)
    task, dice = TASKS[name], Dice(seed)
    compiled = task.build(sharpness, seed)
    drawn = [until(lambda: task.draw(dice)) for _ in range(pairs)]
    return KnownCircuit(
        name=name,
        model=compiled.model,
        edges=compiled.edges,
        written=compiled.written,
        clean=torch.tensor([pair.clean for pair in drawn]),
        corrupt=torch.tensor([pair.corrupt for pair in drawn]),
        positions=torch.tensor([pair.position for pair in drawn]),
        targets=torch.tensor([pair.target for pair in drawn]),
        versus=torch.tensor([pair.versus for pair in drawn]),
    )
