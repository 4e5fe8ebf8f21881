"""Parameters that keep their values in training (`training.freeze`).

A part is named by its place in the model: `embeddings` (of the tokens, the output head too if the two are tied),
`positions`, `blocks`, `final_norm`, `output_head`. Blocks are chosen by number, `blocks.2` or `blocks.0-3` (both ends
included), and parts of them by name: `blocks.2.attention`, `blocks.0-3.feedforward.down`, `blocks.attention_norm`.
"""

import re
from collections.abc import Sequence

from lumiere.config.schema import RunConfig
from lumiere.errors import ConfigError, nearest, quoted
from lumiere.models.transformer import Transformer, empty_model

MODULES = {"embeddings": "token_embedding", "positions": "position_embedding"}
"""Modules of the model that are not called what a config calls them."""
CHOSEN_BLOCKS = re.compile(r"blocks\.([0-9]{1,6})(?:-([0-9]{1,6}))?((?:\..+)?)")
BLOCK = re.compile(r"^blocks\.([0-9]+)")


def freeze(model: Transformer, names: Sequence[str]) -> None:
    """Take the named parts out of training: no gradient, no optimizer state, no weight decay.

    Raises:
        ConfigError: The model has no such part, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for name in names:
        for parameter in chosen(model, name):
            parameters[parameter].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("training.freeze leaves no parameter to train", "remove a part from it")


def trainable(config: RunConfig) -> Transformer:
    """Return the model of a config without memory for its weights, its frozen parts taken out of training.

    Raises:
        ConfigError: As `freeze`.
    """
    model = empty_model(config)
    freeze(model, config.training.freeze)
    return model


def chosen(model: Transformer, name: str) -> list[str]:
    """Return the names of the parameters of a part.

    Raises:
        ConfigError: The model has no such part.
    """
    blocks, path = range(model.num_layers), name
    if match := CHOSEN_BLOCKS.fullmatch(name):
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < model.num_layers:
            raise ConfigError(
                f"training.freeze: there is no {quoted(name)}",
                f"the model has the blocks 0-{model.num_layers - 1}; a range starts with its lower number",
            )
        blocks, path = range(first, last + 1), f"blocks{match[3]}"
    prefix = f"{MODULES.get(path, path)}."
    found = []
    for parameter, _ in model.named_parameters():
        block = BLOCK.match(parameter)
        if BLOCK.sub("blocks", parameter).startswith(prefix) and (block is None or int(block[1]) in blocks):
            found.append(parameter)
    if not found or path in MODULES.values():
        chosen_blocks = f"blocks.{blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else f"blocks.{blocks[0]}"
        raise ConfigError(
            f"training.freeze: the model has no part {quoted(name)}",
            hint(model, path, chosen_blocks if match else "blocks"),
        )
    return found


def hint(model: Transformer, path: str, blocks: str) -> str:
    """Return what to write instead of a part that does not exist.

    Args:
        path: The part, without numbers of blocks.
        blocks: How the blocks were chosen.
    """
    if path == "output_head" and model.output_head is None:
        return "its output head is the token embedding (model.tie_embeddings): freeze embeddings"
    called = {module: name for name, module in MODULES.items()}
    parts: set[str] = set()
    for parameter, _ in model.named_parameters():
        modules = BLOCK.sub("blocks", parameter).split(".")[:-1]
        parts |= {".".join(modules[:depth]) for depth in range(1, len(modules) + 1)}
    names = sorted(called.get(part, part) for part in parts)
    guess = called.get(path) or nearest(path, names)
    if guess is not None:
        return f"did you mean {re.sub('^blocks', blocks, guess)}?"
    inside = [name for name in names if name.count(".") == 1]
    return (
        f"parts are {', '.join(name for name in names if '.' not in name)}; blocks by number, as in blocks.0-1; inside "
        f"them {', '.join(name.removeprefix('blocks.') for name in inside)}, as in {inside[0]} or blocks.0.attention"
    )


def described(model: Transformer, names: Sequence[str]) -> str:
    """Return as text what is frozen, and how much is not; empty if nothing is frozen."""
    head = " (also the output head)" if model.output_head is None else ""
    parts = ", ".join(f"{name}{head}" if name == "embeddings" else name for name in names)
    return parts and f"{parts}; {model.num_trained_parameters:,} parameters are trained"
