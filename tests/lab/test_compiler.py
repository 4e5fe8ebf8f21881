"""The compiler: operations on random programs, against the same operations by hand."""

import math

import pytest
import torch

from lumiere.lab.compiler import compile_program, stages_of
from lumiere.lab.program import Indices, Operation, Tokens, attend, average, piecewise, select, table, table_of_two

SIZE = 4
TOKENS = torch.tensor([[0, 3, 1, 1, 2], [0, 2, 2, 3, 1]])


def values_of(output: Operation, context_size: int = 5) -> torch.Tensor:
    """What the last operation computes, read off the logits, (B, T, W)."""
    compiled = compile_program(output, torch.eye(output.width), None, context_size, seed=3)
    with torch.no_grad():
        return compiled.model.logits(TOKENS)[..., : output.width]


def test_a_table_of_two_sources_looks_up_every_pair() -> None:
    tokens, indices = Tokens(SIZE), Indices(5)
    outputs = torch.randn(SIZE, 5, 3, generator=torch.Generator().manual_seed(0))
    found = values_of(table_of_two(tokens, indices, outputs))
    assert found == pytest.approx(outputs[TOKENS, torch.arange(5)], abs=0.01)


def test_heads_and_tables_in_a_row() -> None:
    """The square of the share of token 1 at the position before, by four parts in two layers."""
    tokens, indices = Tokens(SIZE), Indices(5)
    share = average(table(tokens, torch.eye(SIZE)[:, 1:2]))
    before = attend(indices, [(i, i - 1) for i in range(1, 5)], share, 20.0)
    doubled = piecewise([before], [1.0], [(0.0, 2.0)])
    found = values_of(doubled)[..., 0]
    is_one = (TOKENS == 1).double()
    shares = is_one.cumsum(1) / torch.arange(1, 6)
    assert found[:, 1:] == pytest.approx(2 * shares[:, :-1], abs=0.01)


def test_scores_weigh_as_a_softmax() -> None:
    tokens = Tokens(SIZE)
    scores = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    found = values_of(select(tokens, tokens, scores, tokens))
    query, key = TOKENS[:, -1], TOKENS
    weights = torch.softmax(scores[query[:, None], key], dim=1)
    expected = torch.zeros(2, SIZE).scatter_add(1, key, weights)
    assert found[:, -1] == pytest.approx(expected, abs=0.01)


def test_stages_follow_what_is_read() -> None:
    tokens, indices = Tokens(SIZE), Indices(5)
    head = average(tokens)
    mapped = table(head, torch.eye(SIZE))
    late = average(mapped)
    stages = stages_of([tokens, indices, head, mapped, late])
    assert list(stages.values()) == [-1, -1, 0, 1, 2]


def test_edges_are_those_that_the_program_reads() -> None:
    tokens, indices = Tokens(SIZE), Indices(5)
    before = attend(indices, [(i, i - 1) for i in range(1, 5)], tokens, 20.0)
    compiled = compile_program(table_of_two(before, tokens, torch.rand(SIZE, SIZE, 2)), torch.eye(2), None, 5)
    (head,) = {writer for writer, _ in compiled.written if writer.startswith("L0H")}
    varying = [("embed", f"{head}.v"), (head, "L0.mlp"), ("embed", "L0.mlp"), ("L0.mlp", "logits")]
    assert set(compiled.edges) == set(varying)
    assert set(compiled.written) == {*varying, ("pos", f"{head}.q"), ("pos", f"{head}.k")}


def test_the_constant_hardly_lets_a_norm_change() -> None:
    compiled = compile_program(average(Tokens(SIZE)), torch.eye(SIZE), torch.full((SIZE,), 7.0), 5)
    with torch.no_grad():
        output = compiled.model(TOKENS)
        scales = compiled.model.final_norm.scale(output.residuals[-1])
    assert scales == pytest.approx(torch.full_like(scales, 300 / math.sqrt(compiled.model.embedding_size)), rel=1e-3)
    assert output.logits.sum(-1) == pytest.approx(torch.full((2, 5), 7.0 * SIZE + 1), abs=0.02)
