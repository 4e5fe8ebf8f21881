"""What a comparison of two models reads: the second model, and whole texts if the tokenizers differ."""

from typing import TYPE_CHECKING

from lumiere.api.target import InspectTarget
from lumiere.errors import LumiereError

if TYPE_CHECKING:
    from lumiere.data.text import Part
    from lumiere.models.transformer import Transformer


def as_placed(model: "Transformer", example: "Transformer") -> "Transformer":
    """Return a model, or a copy of it, on the device and in the type of another one."""
    from copy import deepcopy

    weight, own = example.token_embedding.weight, model.token_embedding.weight
    if (weight.device, weight.dtype) == (own.device, own.dtype):
        return model
    return deepcopy(model).to(device=weight.device, dtype=weight.dtype)


def choose_documents(target: InspectTarget, num_windows: int) -> tuple[list["Part"], str]:
    """Return whole texts in parts and their source; without a text option, validation documents drawn by the seed.

    Args:
        num_windows: the drawn documents have about as many tokens as this many windows of A.
    """
    import numpy as np

    from lumiere.data.batches import permute
    from lumiere.data.corpus import numbered_parts
    from lumiere.data.dataset import source_parts
    from lumiere.data.text import blocks, parts, plain

    given, opened = target.given, target.opened
    has_ids = given == "prompt" and not isinstance(target.text["prompt"], str)
    if given in ("random", "val") or has_ids:
        raise LumiereError(f"the tokenizers differ, and --{given} gives tokens of A", "give a text: --prompt or --file")
    if given is not None:
        text = str(target.text[given])
        documents = list(parts([plain(text)] if given == "prompt" else blocks(text)))
        if not documents:
            raise LumiereError("the text is empty", "give a text, or omit it to use the validation split")
        return documents, "prompt" if given == "prompt" else text
    corpus = target.corpus(", or give a text: --prompt or --file")
    offsets = corpus.splits["validation"].offsets
    count = len(offsets) - 1
    order = permute(np.arange(count), count, key=str(target.seed))
    reached = np.cumsum(np.diff(offsets)[order])
    enough = int(np.searchsorted(reached, num_windows * opened.config.model.context_size)) + 1
    chosen = set(order[:enough].tolist())
    dataset = opened.config.dataset
    found, _ = source_parts(dataset, corpus, "validation")
    return [part for number, part in numbered_parts(found) if number in chosen], (
        f"{len(chosen):,} of {count:,} documents of the validation split of {dataset.name} (seed {target.seed})"
    )
