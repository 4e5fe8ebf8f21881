"""The kernels against torch's own operations and finite differences."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import library
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from lumiere.components import kernels
from lumiere.components.kernels import (
    BFLOAT16_FUSED_MIN_POSITIONS,
    IGNORED,
    attention,
    attention_mask,
    dropout_mask,
    dropout_mask_op,
    linear_cross_entropy,
    linear_cross_entropy_losses,
)

POSITIONS = torch.arange(3)[None]


def test_the_mask_by_hand() -> None:
    assert (attention_mask(POSITIONS, 3, torch.float32) == 0).int().tolist() == [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]
    rows = torch.tensor([[1], [0]])  # one query each, at different positions of a cache
    assert (attention_mask(rows, 3, torch.float32) == 0).int().tolist() == [[[[1, 1, 0]]], [[[1, 0, 0]]]]
    real_BT = torch.tensor([[False, True, True], [True, True, False]])
    assert (attention_mask(POSITIONS, 3, torch.float32, real_BT) == 0).int().tolist() == [
        [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]],  # a padding token sees itself only, and no other token sees it
        [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]],
    ]


@pytest.mark.parametrize("num_positions", [1, 7, 64])
@pytest.mark.parametrize("d_value", [4, 6])
def test_both_kernels_equal_torchs_attention(num_positions: int, d_value: int) -> None:
    q_BHTK, k_BHTK = torch.randn(2, 2, 3, num_positions, 4, dtype=torch.float64).unbind()
    v_BHTV = torch.randn(2, 3, num_positions, d_value, dtype=torch.float64)
    mask_TS = torch.ones(num_positions, num_positions, dtype=torch.bool).tril()
    expected_BHTV = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTV, attn_mask=mask_TS)
    torch.testing.assert_close(
        attention(q_BHTK, k_BHTK, v_BHTV, q_BHTK.shape[-1] ** -0.5), expected_BHTV, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("dtype", "num_positions", "d_value", "is_kept"),
    [
        (torch.float32, 64, 4, False),
        (torch.float32, 64, 5, True),  # torch's fused attention wants values as wide as keys
        (torch.bfloat16, 64, 4, True),
        (torch.bfloat16, BFLOAT16_FUSED_MIN_POSITIONS, 4, False),
    ],
)
def test_the_pattern_is_kept_only_where_that_is_faster(
    dtype: torch.dtype, num_positions: int, d_value: int, is_kept: bool
) -> None:
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    inputs = [torch.randn(1, 1, num_positions, width, dtype=dtype, requires_grad=True) for width in (4, 4, d_value)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention(*inputs, scale=0.5)
    assert (max(sizes) >= num_positions**2) == is_kept


@pytest.mark.parametrize("num_positions", [16, BFLOAT16_FUSED_MIN_POSITIONS])
def test_attention_in_bfloat16_stays_near_float32(num_positions: int) -> None:
    q_BHTK, k_BHTK, v_BHTV = (torch.randn(2, 2, num_positions, 8) for _ in range(3))
    expected_BHTV = attention(q_BHTK, k_BHTK, v_BHTV, scale=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        z_BHTV = attention(q_BHTK.bfloat16(), k_BHTK.bfloat16(), v_BHTV.bfloat16(), scale=0.3)
    assert z_BHTV.dtype == torch.bfloat16
    # bfloat16 has 8 bits: a relative error of 2^-9 for each rounding.
    torch.testing.assert_close(z_BHTV.float(), expected_BHTV, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (partial(kernels.attention, scale=0.7), [(2, 2, 6, 3), (2, 2, 6, 3), (2, 2, 6, 5)]),  # d_value is not d_key
        (partial(kernels.attention, scale=0.7), [(2, 2, 6, 3)] * 3),  # torch's fused kernel
        (partial(kernels.rms_norm, epsilon=0.1), [(2, 3, 6), (6,)]),
        (kernels.gated_silu, [(2, 4, 10)]),
    ],
)
def test_gradients_are_those_of_finite_differences_and_of_the_plain_way(
    function: Callable[..., torch.Tensor], shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert gradcheck(function, inputs)
    weights = torch.randn_like(function(*inputs))
    mine = torch.autograd.grad((function(*inputs) * weights).sum(), inputs)
    with torch.no_grad():
        without_gradients = function(*inputs)
    torch.testing.assert_close(function(*inputs), without_gradients, rtol=0, atol=0)
    monkeypatch.setattr("lumiere.components.kernels.prefers_hand_written", lambda x: False)
    plain = torch.autograd.grad((function(*inputs) * weights).sum(), inputs)
    for gradient, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dropout_mask_has_the_rate_and_the_mean(rate: float, dtype: torch.dtype) -> None:
    mask = dropout_mask(torch.tensor(5), (400, 500), rate, dtype)
    assert mask.dtype == dtype
    is_zero = mask == 0
    # Five standard deviations of a binomial of 200,000 draws.
    assert abs(is_zero.double().mean().item() - rate) <= 5 * (rate * (1 - rate) / 200_000) ** 0.5 + 2**-17
    assert torch.equal(mask[~is_zero].unique(), torch.tensor([1 / (1 - rate)], dtype=dtype))


def test_neighbors_in_a_dropout_mask_are_independent() -> None:
    is_zero = dropout_mask(torch.tensor(1), (1_000_000,), 0.5, torch.float32) == 0
    for distance in (1, 2, 3, 4):  # four numbers come from one random word
        both = (is_zero[distance:] & is_zero[:-distance]).double().mean().item()
        assert both == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 1e6) ** 0.5 * 1.5)


def test_the_compiler_gets_the_same_dropout_mask() -> None:
    arguments = (torch.tensor(7), (3, 5), 0.3, torch.bfloat16)
    library.opcheck(dropout_mask_op, arguments)  # its fake twin gives the same shape and type
    assert torch.equal(dropout_mask_op(*arguments), dropout_mask(*arguments))


ROWS, VOCAB, WIDTH = 11, 7, 5


@pytest.fixture(params=[1, 3 * VOCAB, 11 * VOCAB, 2**21], ids=["1 row", "3 rows", "11 rows", "all rows"])
def chunk_logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(kernels.CHUNK_LOGITS, "cpu", request.param)
    monkeypatch.setattr(kernels, "MIN_CHUNK_ROWS", 1)
    return request.param


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    weight = (3 * torch.randn(VOCAB, WIDTH, dtype=dtype)).requires_grad_()
    targets = torch.randint(0, VOCAB, (ROWS,))
    targets[[2, 3, 10]] = IGNORED
    return x, weight, targets


@pytest.mark.usefixtures("chunk_logits")
def test_losses_and_gradients_are_those_of_torch() -> None:
    x, weight, targets = make_inputs()
    loss = linear_cross_entropy(x, weight, targets)
    expected_N = F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(loss, expected_N.sum(), rtol=0, atol=1e-12)
    losses_N = linear_cross_entropy_losses(x, weight, targets)
    assert not losses_N.requires_grad
    torch.testing.assert_close(losses_N, expected_N.detach(), rtol=0, atol=1e-12)
    for scale in (1.0, 0.25):
        mine = torch.autograd.grad(scale * linear_cross_entropy(x, weight, targets), [x, weight])
        plain = torch.autograd.grad(scale * expected_N.sum(), [x, weight], retain_graph=True)
        for gradient, other in zip(mine, plain, strict=True):
            torch.testing.assert_close(gradient, other, rtol=0, atol=1e-12)
        assert torch.equal(mine[0][[2, 3, 10]], torch.zeros(3, WIDTH, dtype=torch.float64))
    assert gradcheck(lambda x, weight: linear_cross_entropy(x, weight, targets), [x, weight])


def test_a_tied_weight_gets_both_gradients() -> None:
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=True)
    tokens, targets = torch.randint(0, VOCAB, (2, ROWS))
    (mine,) = torch.autograd.grad(linear_cross_entropy(weight[tokens], weight, targets), [weight])
    (plain,) = torch.autograd.grad(F.cross_entropy(weight[tokens] @ weight.T, targets, reduction="sum"), [weight])
    torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_inputs_are_not_hidden(value: float) -> None:
    x, weight, targets = make_inputs(torch.float32)
    with torch.no_grad():
        x[0, 0] = value
    assert not linear_cross_entropy(x, weight, targets).isfinite()


@pytest.mark.usefixtures("chunk_logits")
@pytest.mark.parametrize(("is_certain", "tolerance"), [(False, 0.02), (True, 0.03)], ids=["random", "nearly certain"])
def test_in_bfloat16_losses_and_gradients_stay_near(is_certain: bool, tolerance: float) -> None:
    """Sums are in float32, and gradients of nearly certain tokens keep their digits."""
    weight, targets = torch.randn(100, 32, requires_grad=True), torch.arange(64)
    x = (weight.detach()[targets] * 0.35 if is_certain else torch.randn(64, 32)).requires_grad_()
    expected = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    assert (0.001 < expected.item() / 64 < 0.1) == is_certain
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
    assert loss.dtype == torch.float32
    assert is_certain or loss.item() == pytest.approx(expected.item(), rel=2e-3)
    mine, plain = (torch.autograd.grad(value, [x, weight]) for value in (loss, expected))
    for gradient, other in zip(mine, plain, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.dist(gradient, other) < tolerance * other.norm()


LEVELS = [-1000.0, -200.0, -100.0, -95.0, -90.0, -60.0, 60.0, 90.0, 95.0, 100.0, 200.0, 1000.0]
"""What all logits of a row are near, in nats. Powers of e below -87.3 and above 88.7 are not normal float32 numbers."""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("precision", "loss_tolerance", "tolerance"), [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 4e-3, 0.01)]
)
def test_a_level_that_all_logits_share_changes_neither_loss_nor_gradients(
    level: float, precision: torch.dtype, loss_tolerance: float, tolerance: float
) -> None:
    x, weight = torch.randn(64, 17), 0.4 * torch.randn(200, 17)
    x[:, -1], weight[:, -1] = 1.0, level  # so every logit is raised by the level
    x, weight = (tensor.to(precision).float().requires_grad_() for tensor in (x, weight))
    targets = torch.randint(0, 200, (64,))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected_rows = -(wide[0] @ wide[1].T).log_softmax(-1)[torch.arange(64), targets]
    expected = expected_rows.sum()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
    assert loss.item() / 64 == pytest.approx(expected.item() / 64, abs=loss_tolerance)
    mine, plain = torch.autograd.grad(loss, [x, weight]), torch.autograd.grad(expected, wide)
    # Without the last column of x's gradient: it is the level times the sum of the probabilities' rounding errors.
    for gradient, other in zip((mine[0][:, :-1], mine[1]), (plain[0][:, :-1], plain[1]), strict=True):
        assert torch.dist(gradient.double(), other) < tolerance * other.norm()
    rows = linear_cross_entropy_losses(x.detach(), weight.detach(), targets)
    torch.testing.assert_close(rows.double(), expected_rows.detach(), rtol=0, atol=max(1e-5, 1e-6 * abs(level)))


def test_a_large_vocabulary_does_not_make_small_chunks() -> None:
    targets = torch.zeros(600, dtype=torch.long)
    chunks = kernels.chunks_of_powers(torch.randn(600, 2), torch.randn(10_000, 2), targets)
    assert len(next(chunks).x) >= 256


def test_off_the_cpu_logits_are_computed_once_and_nothing_waits_for_the_device() -> None:
    x, weight = (torch.empty(size, WIDTH, device="meta") for size in (ROWS, VOCAB))
    targets = torch.empty(ROWS, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        losses = linear_cross_entropy_losses(x, weight, targets)  # reading a value of the meta device raises
    assert losses.shape == (ROWS,)
    assert counter.get_total_flops() == 2 * ROWS * WIDTH * VOCAB
