"""Directions of the residual stream as files: `FILE.safetensors`, tied to a model by its hash.

Importing this module loads neither torch nor safetensors.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.errors import CheckpointError, LumiereError
from lumiere.files import DISK, parse_json
from lumiere.persistence.loading import OpenedModel
from lumiere.persistence.tensor_files import open_safetensors

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "lumiere direction 1"
MAX_BYTES = 2**26
DEFAULT_SCALE = 0.1
SPECIFICATION = re.compile(r"(?P<path>.*?\.safetensors)(@(?P<layers>[^*]*))?(\*(?P<scale>.*))?")


@dataclass(frozen=True)
class Origin:
    """Where a direction comes from: what its file says beside the numbers."""

    method: str
    """In words, such as `difference of means`."""
    layer: int
    """The block after which it was found, and is added by default."""
    run: str
    checkpoint: str
    weights_sha256: str
    tokenizer_sha256: str


@dataclass(frozen=True)
class Direction:
    """A direction of the residual stream.

    Attributes:
        vector: (E,), of any length: its norm is a fact about how it was found, not how far to steer.
        norms: (L,) the mean norm of the stream after each block, in which a scale is measured.
    """

    vector: Tensor = field(repr=False)
    norms: Tensor = field(repr=False)
    origin: Origin

    def step(self, layer: int, scale: float) -> Tensor:
        """Return what is added after a block, (E,): of `scale` times the stream's mean norm there."""
        return self.vector * (scale * self.norms[layer] / self.vector.norm())

    def save(self, path: Path) -> None:
        """Write the file.

        Raises:
            LumiereError: The name does not end in .safetensors, or it cannot be written.
        """
        from safetensors.torch import save

        check_name(path)
        tensors = {"vector": self.vector.cpu().contiguous(), "norms": self.norms.cpu().contiguous()}
        data = save(tensors, {"format": FORMAT, "origin": json.dumps(asdict(self.origin))})
        try:
            DISK.write(path, data)
        except OSError as error:
            raise LumiereError(f"{str(path)!r} cannot be written: {error.strerror}", "choose another path") from None


def check_name(path: Path) -> None:
    """Raise `LumiereError` unless a direction can be written to `path`."""
    if path.suffix != ".safetensors":
        raise LumiereError(f"{str(path)!r} is not the name of a direction", "end it in .safetensors")
    if path.is_dir() or not path.parent.is_dir():
        raise LumiereError(f"{str(path)!r} cannot be written", "choose a file in a folder that exists")


def load_direction(path: Path) -> Direction:
    """Read a direction.

    Raises:
        LumiereError: There is no such file, or it holds no direction.
    """
    wrong = LumiereError(
        f"{str(path)!r} holds no direction", "lumiere inspect steer --save FILE.safetensors writes one"
    )
    if not path.is_file():
        raise LumiereError(f"there is no file {str(path)!r}", "check the path of the direction")
    if path.stat().st_size > MAX_BYTES:
        raise wrong
    try:
        with open_safetensors(path) as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT or set(file.keys()) != {"vector", "norms"}:
                raise wrong
            vector, norms = file.get_tensor("vector"), file.get_tensor("norms")
        origin = Origin(**_checked(parse_json(about["origin"])))
    except (CheckpointError, KeyError, ValueError, TypeError):
        raise wrong from None
    for tensor in (vector, norms):
        if tensor.ndim != 1 or not tensor.dtype.is_floating_point or not bool(tensor.isfinite().all()):
            raise wrong
    if not bool(vector.any()) or not 0 <= origin.layer < len(norms):
        raise wrong
    return Direction(vector, norms, origin)


def _checked(origin: Any) -> dict[str, Any]:
    """Return the entries of an origin, each of its type and without characters that control a terminal."""
    if not isinstance(origin, dict) or type(origin.get("layer")) is not int:
        raise ValueError("no origin")
    texts = [value for name, value in origin.items() if name != "layer"]
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise ValueError("not a text")
    return origin


def check_fits(direction: Direction, opened: OpenedModel, path: Path) -> None:
    """Check that a direction was found in this very model.

    Raises:
        LumiereError: It has another width, or comes from other weights.
    """
    width, expected = len(direction.vector), opened.model.embedding_size
    if width != expected or len(direction.norms) != opened.model.num_layers:
        raise LumiereError(
            f"{str(path)!r} is a direction of width {width} in {len(direction.norms)} layers, "
            f"the model has {expected} in {opened.model.num_layers}",
            f"it comes from {direction.origin.run}; find one in this run with lumiere inspect steer --save",
        )
    if direction.origin.weights_sha256 != opened.weights_sha256:
        raise LumiereError(
            f"{str(path)!r} was found in other weights: {direction.origin.run}, checkpoint "
            f"{direction.origin.checkpoint}",
            "choose that run and checkpoint, or find a direction in this one with lumiere inspect steer --save",
        )


def parse_steer(text: str) -> tuple[Path, str | None, float]:
    """Return the file, the layers (None: the file's own) and the scale of `FILE.safetensors[@layer][*scale]`.

    Raises:
        LumiereError: It is not of this form.
    """
    found = SPECIFICATION.fullmatch(text)
    form = "write FILE.safetensors, FILE.safetensors@2 or FILE.safetensors@2*0.5"
    if found is None:
        raise LumiereError(f"{text!r} names no direction", form)
    if found["layers"] == "" or found["scale"] == "":
        raise LumiereError(f"{text!r} is not complete", form)
    try:
        scale = DEFAULT_SCALE if found["scale"] is None else float(found["scale"])
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise LumiereError(f"the scale {found['scale']!r} is not a number", form)
    return Path(found["path"]), found["layers"], scale
