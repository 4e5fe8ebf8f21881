"""Compare an imported model with the same model in `transformers`."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lumiere.errors import LumiereError
from lumiere.models.transformer import Transformer

SEQUENCES, LENGTH = 4, 64
TOLERANCE, RELATIVE_TOLERANCE = 1e-4, 1e-6
"""Of a log-probability in float32: absolute, and relative to the largest logit."""
FLOAT64_TOLERANCE = 1e-8

Load = Callable[[torch.dtype], nn.Module]


def verify(model: Transformer, load: Load, ids: Sequence[int]) -> float:
    """Return the largest difference of a log-probability on random tokens.

    A difference that float32 may not explain is computed again in float64.

    Args:
        load: Loads the model of `transformers` in a type.
        ids: Tokens to draw from.

    Raises:
        LumiereError: The models differ, or `transformers` cannot load the source.
    """
    generator = torch.Generator().manual_seed(0)
    size = SEQUENCES, min(LENGTH, model.context_size)
    tokens = torch.tensor(ids)[torch.randint(len(ids), size, generator=generator)]
    error, largest = difference(model, load, tokens, torch.float32)
    if error <= TOLERANCE + RELATIVE_TOLERANCE * largest:
        return error
    exact, _ = difference(copy.deepcopy(model).double(), load, tokens, torch.float64)
    if exact <= FLOAT64_TOLERANCE:
        return error
    raise LumiereError(
        f"the imported model differs from transformers by {exact:.1e} in log-probability, in float64",
        "no run was made; please report this model",
    )


@torch.inference_mode()
def difference(model: Transformer, load: Load, tokens: torch.Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest difference of a log-probability, and the largest logit in absolute value."""
    try:
        reference = load(dtype)
    except Exception as error:  # of many kinds, for files that Lumiere has read without complaint
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise LumiereError(f"transformers cannot load this model: {reason}", "skip the check: --no-verify") from None
    theirs = reference(tokens).logits
    ours = model.logits(tokens)
    if ours.shape != theirs.shape:
        raise LumiereError(
            f"transformers has {theirs.shape[-1]:,} logits, Lumiere {ours.shape[-1]:,}", "no run was made"
        )
    gap = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max()
    return float(gap), float(theirs.abs().max())
