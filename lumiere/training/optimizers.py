"""AdamW, alone or beside Muon, behind one small face whose state is a flat mapping of named tensors."""

import torch
from torch import Tensor, nn, optim

from lumiere.config.schema import TrainingConfig
from lumiere.training.muon import Muon
from lumiere.training.shards import like

STATE = {optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}
"""What each keeps of a parameter: numbers of its shape, and the count of steps."""


class Optimizers:
    """The optimizers of a model, stepped together.

    AdamW (Loshchilov & Hutter 2019) moves everything, or, where `optimizer` is `muon`, everything but the blocks'
    matrices, which Muon moves (Jordan et al. 2024, with its scaling of an update by sqrt(max(1, rows / columns))).
    Weight decay acts on matrices and embeddings, not on the norms' gains.

    Args:
        precision: in which Muon orthogonalises.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, precision: torch.dtype = torch.float32) -> None:
        self._parameters = dict(model.named_parameters())
        muon = {
            name
            for name, parameter in self._parameters.items()
            if config.optimizer == "muon" and name.startswith("blocks.") and parameter.ndim == 2
        }
        others = [parameter for name, parameter in self._parameters.items() if name not in muon]
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
        if muon:
            matrices = [self._parameters[name] for name in sorted(muon)]
            decay = config.weight_decay if config.muon_weight_decay is None else config.muon_weight_decay
            self._optimizers.append(Muon(matrices, config.muon_learning_rate, decay, dtype=precision))
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
        """What the next step depends on, as `<parameter>.<quantity>`; empty before the first step."""
        return {
            f"{name}.{quantity}": value
            for optimizer in self._optimizers
            for name, parameter in self._parameters.items()
            for quantity, value in optimizer.state.get(parameter, {}).items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_tensors` gave.

        Raises:
            ValueError: it was given by other optimizers, or for another model.
        """
        for optimizer in self._optimizers:
            mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for name, parameter in self._parameters.items():
                if id(parameter) not in mine:
                    continue
                found = {
                    key.removeprefix(f"{name}."): value
                    for key, value in tensors.items()
                    if key.rpartition(".")[0] == name
                }
                # The optimizer would come across what is missing, or of another shape, in the middle of its first step.
                expected = {
                    quantity: () if quantity == "step" else parameter.shape for quantity in STATE[type(optimizer)]
                }
                if found and {quantity: value.shape for quantity, value in found.items()} != expected:
                    raise ValueError(f"no state of the optimizer for {name}")
                optimizer.state[parameter] = {quantity: restored(value, parameter) for quantity, value in found.items()}


def restored(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of a state tensor on the parameter's device, and shared out as the parameter is.

    Raises:
        ValueError: it is of another type than the parameter.
    """
    if value.dtype != parameter.dtype:
        raise ValueError(f"a state of type {value.dtype} for a parameter of type {parameter.dtype}")
    return like(value, parameter) if value.ndim else value.to(parameter.device, copy=True)
