"""Rotary and learned positions: hand-computed values and the laws of a rotation."""

import math

import torch

from lumiere.components.layers import LearnedPositions, rotate, rotation_at


def test_rotation_by_hand() -> None:
    rotation = rotation_at(torch.tensor([3]), d_key=4, dtype=torch.float64)
    # Pair 0 is (x0, x2) and turns by 3; pair 1 is (x1, x3) and turns by 3 / 100.
    x_BTHK = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
    expected_K = torch.tensor([math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)], dtype=torch.float64)
    torch.testing.assert_close(rotate(x_BTHK, rotation).flatten(), expected_K)


def test_position_zero_does_not_turn_and_no_position_changes_a_length() -> None:
    rotation = rotation_at(torch.arange(50), d_key=8, dtype=torch.float64)
    x_BTHK = torch.randn(2, 50, 3, 8, dtype=torch.float64)
    turned_BTHK = rotate(x_BTHK, rotation)
    assert torch.equal(turned_BTHK[:, 0], x_BTHK[:, 0])
    torch.testing.assert_close(turned_BTHK.norm(dim=-1), x_BTHK.norm(dim=-1))


def test_products_depend_on_the_distance_only() -> None:
    q_K, k_K = torch.randn(2, 8, dtype=torch.float64)

    def product(query_position: int, key_position: int) -> torch.Tensor:
        rotation = rotation_at(torch.tensor([query_position, key_position]), d_key=8, dtype=torch.float64)
        q_turned_K, k_turned_K = rotate(torch.stack([q_K, k_K])[None, :, None], rotation)[0, :, 0]
        return q_turned_K.dot(k_turned_K)

    torch.testing.assert_close(product(9, 4), product(105, 100))
    assert not torch.isclose(product(9, 4), product(9, 5))


def test_tables_are_precise_for_low_precision_queries() -> None:
    rotation = rotation_at(torch.tensor([1000]), d_key=2, dtype=torch.float32)
    x_BTHK = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).view(1, 1, 1, 2)
    turned_BTHK = rotate(x_BTHK, rotation)
    assert turned_BTHK.dtype == torch.bfloat16
    expected_K = torch.tensor([math.cos(1000), math.sin(1000)]).to(torch.bfloat16)
    assert torch.equal(turned_BTHK.flatten(), expected_K)


def test_learned_positions_are_rows() -> None:
    positions = LearnedPositions(context_size=5, embedding_size=2)
    with torch.no_grad():
        positions.weight.copy_(torch.arange(10.0).view(5, 2))
    assert positions(torch.tensor([3, 0])).tolist() == [[6.0, 7.0], [0.0, 1.0]]
