"""The optimizers, AdamW and Muon, and the exponential moving average (EMA) of the weights."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn, optim

from lumiere.config.schema import TrainingConfig
from lumiere.training.parallel import apply_to_full, distribute_like

# The quintic a x + b x^3 + c x^5 of the original, steepest at zero: five rounds take every singular value between
# about 0.01 and 1 to between 0.7 and 1.2, which is near enough to 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class Muon(optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum whose update is replaced by the nearest orthogonal matrix.

    For matrices inside a network, not for embeddings. The same rule as `torch.optim.Muon`, which takes the matrices one
    by one and always in bfloat16. Here matrices of one shape are stacked, in the type that the device is fast in. If
    they are sharded, each process orthogonalizes some of them.

    Args:
        parameters: Matrices.
        lr: Learning rate; the update it scales has spectral norm about 1, times sqrt(max(1, rows / columns)).
        weight_decay: Decoupled.
        momentum: Decay of the mean of the gradients (Nesterov).
        dtype: Type of the orthogonalization.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            momenta = []
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = self.state[parameter]["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                momenta.append(parameter.grad.lerp(buffer, group["momentum"]))
            orthogonalized = apply_to_full(lambda matrices: orthogonalize_each(matrices, self._dtype), momenta)
            for parameter, update in zip(parameters, orthogonalized, strict=True):
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))


def orthogonalize_each(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Orthogonalize every matrix, stacking those of one shape or its transpose; keep their order and type."""
    places: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for place, matrix in enumerate(matrices):
        rows, columns = matrix.shape
        places[min(rows, columns), max(rows, columns)].append(place)
    results = list(matrices)
    for (rows, _), here in places.items():
        # Wide, because the rounds multiply by a square matrix of the number of rows.
        wide = [matrices[place] if len(matrices[place]) == rows else matrices[place].T for place in here]
        stacked = orthogonalize(torch.stack(wide).to(dtype))
        for place, result in zip(here, stacked, strict=True):
            matrix = matrices[place]
            results[place] = (result if len(matrix) == rows else result.T).to(matrix.dtype)
    return results


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return roughly U V^T of each matrix U S V^T, by Newton-Schulz rounds: (count, rows, columns), rows <= columns.

    Singular values end between about 0.7 and 1.2; those below a hundredth of the matrix's Frobenius norm end lower.
    """
    a, b, c = COEFFICIENTS
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


STATE = {optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}
"""The state of each optimizer for a parameter: tensors of its shape, and the number of steps."""


class Optimizers:
    """The optimizers of a model, stepped together. Their state is a flat mapping of named tensors.

    AdamW (Loshchilov & Hutter 2019) updates everything. With `optimizer: muon`, Muon updates the matrices of the blocks
    and AdamW the rest. Weight decay applies to matrices and embeddings, not to the gains of norms. Parameters without
    `requires_grad` are frozen: they have no state, and nothing changes them.

    Args:
        precision: Type in which Muon orthogonalizes.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, precision: torch.dtype = torch.float32) -> None:
        self._parameters = trained_parameters(model)
        named = self._parameters.items()
        is_muon = {n: config.optimizer == "muon" and n.startswith("blocks.") and p.ndim == 2 for n, p in named}
        others = [parameter for name, parameter in named if not is_muon[name]]
        adamw = optim.AdamW(
            [
                {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
                {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        self._optimizers: list[optim.Optimizer] = [adamw]
        if any(is_muon.values()):
            matrices = [parameter for name, parameter in sorted(named) if is_muon[name]]
            decay = config.weight_decay if config.muon_weight_decay is None else config.muon_weight_decay
            self._optimizers.append(Muon(matrices, config.muon_learning_rate, decay, dtype=precision))
        self._optimizer_of = {name: self._optimizers[is_muon[name]] for name in self._parameters}
        self._peaks = [group["lr"] for group in self._groups]

    @property
    def _groups(self) -> list[dict]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self, factor: float) -> None:
        """Update the weights with `factor` times the peak learning rates, and clear the gradients."""
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state by `<parameter>.<quantity>`; empty before the first step."""
        return {
            f"{name}.{quantity}": value
            for name, parameter in self._parameters.items()
            for quantity, value in self._optimizer_of[name].state.get(parameter, {}).items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load what `state_tensors` returned.

        Raises:
            ValueError: It belongs to other optimizers or to another model.
        """
        by_name: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, value in tensors.items():
            name, _, quantity = key.rpartition(".")
            by_name[name][quantity] = value
        if unknown := by_name.keys() - self._parameters.keys():
            raise ValueError(f"a state of the optimizer for {min(unknown)}, which is not trained")
        for name, parameter in self._parameters.items():
            found, optimizer = by_name[name], self._optimizer_of[name]
            # The optimizer itself would fail on missing or misshaped state in the middle of its first step.
            expected = {quantity: () if quantity == "step" else parameter.shape for quantity in STATE[type(optimizer)]}
            is_known = {quantity: value.shape for quantity, value in found.items()} == expected
            if found and not (is_known and {value.dtype for value in found.values()} == {parameter.dtype}):
                raise ValueError(f"no state of the optimizer for {name}")
            optimizer.state[parameter] = {
                quantity: distribute_like(value, parameter) if value.ndim else value.to(parameter.device, copy=True)
                for quantity, value in found.items()
            }


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training updates by their names."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class WeightAverage:
    """Exponential moving average: `average = decay * average + (1 - decay) * weights` after each step.

    Polyak & Juditsky 1992. Early in training the decay is (1 + step) / (10 + step) if that is smaller, so that
    untrained weights leave the average quickly (as in `tf.train.ExponentialMovingAverage`).

    Args:
        model: The model whose trained weights are averaged; the average starts as a copy of them.
        decay: Fraction of the average that a step keeps, 0 to 1: about 1 / (1 - decay) steps are averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = trained_parameters(model)
        self._averages = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after update `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model holds the average, and the average holds the weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Swap in place: FSDP, which refers to the memory of the weights, must find the average there."""
        for name, average in self._averages.items():
            parameter = self._parameters[name]
            weight = parameter.clone()
            parameter.copy_(average)
            average.copy_(weight)

    def tensors(self) -> dict[str, Tensor]:
        """Return the average of each trained parameter by its name in the model."""
        return dict(self._averages)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load what `tensors` returned."""
        for name, average in self._averages.items():
            average.copy_(distribute_like(tensors[name], average))
