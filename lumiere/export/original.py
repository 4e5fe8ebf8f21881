"""What is exported, and what every export is compared on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from lumiere.data.tokenizer import Tokenizer
from lumiere.errors import LumiereError
from lumiere.models.transformer import Transformer
from lumiere.programs import install_command

FLOAT32_TOLERANCE = 1e-4
"""Of logits that two libraries compute in float32, relative to the largest."""
MAX_TOKENS = 256
"""Longest sequence whose logits are compared, which are `vocab_size` numbers per token."""
TEXTS = (
    "Once upon a time, there was a small house.",
    "  two  spaces, a tab\t and\n\nlines \n",
    "def f(x):\n    return x[0] != 12345 or 3.14",
    "naïve café, Zoë e\u0301, ﬁne x² ½, 日本語, Ελλάδα, 👩‍🚀 🙂",
    "<|sot|> <|eot|> <|endoftext|> <s> </s> [INST]",
    "",
)
"""Texts whose ids are compared."""


@dataclass(frozen=True)
class Original:
    """A model with its tokenizer.

    Attributes:
        model: In evaluation mode, on the CPU.
        origin: Provenance, for people.
        card: The model card, if there is one.
    """

    model: Transformer
    tokenizer: Tokenizer
    origin: Mapping[str, Any]
    card: str | None = None

    @cached_property
    def sample(self) -> Tensor:
        """Random ids, (1, T), always the same; T covers all positions up to `MAX_TOKENS`."""
        return sample_tokens(self.model.context_size, self.tokenizer.text_ids)


def sample_tokens(context_size: int, ids: Sequence[int]) -> Tensor:
    """Return random ids, (1, T), always the same; T covers all positions up to `MAX_TOKENS`."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(ids), (1, min(context_size, MAX_TOKENS)), generator=generator)
    return torch.tensor(ids)[places]


def need(target: str, *packages: str) -> None:
    """Check that packages are installed.

    Raises:
        LumiereError: One is not.
    """
    if missing := [package for package in packages if find_spec(package.partition(">")[0]) is None]:
        raise LumiereError(
            f"an export to {target} is checked with {' and '.join(missing)}, which is not installed",
            f"install it: {install_command(*missing)}",
        )


def render(template: str, **values: Any) -> bytes:
    """Render a file of `templates/`."""
    environment = Environment(
        loader=PackageLoader("lumiere.export"),
        autoescape=False,  # Python and Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{template}.j2").render(values).encode()
