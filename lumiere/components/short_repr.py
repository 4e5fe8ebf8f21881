"""A `repr` that shows the shapes of tensors and arrays, not pages of their values."""

import reprlib
from dataclasses import fields
from typing import Any


class ShapeRepr(reprlib.Repr):
    """Tensors and arrays as `Tensor[2, 3]`, the rest as usual, but cut where it is long."""

    def repr1(self, x: Any, level: int) -> str:
        shape = getattr(x, "shape", ())
        return f"{type(x).__name__}{list(shape)}" if shape else super().repr1(x, level)


SHAPES = ShapeRepr()
SHAPES.maxother = SHAPES.maxstring = 60


class ShortRepr:
    """The base of dataclasses that hold tensors or arrays."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__repr__ = short_repr  # in the class itself: `dataclass` replaces one that is inherited


def short_repr(self: Any) -> str:
    shown = (f"{field.name}={SHAPES.repr(getattr(self, field.name))}" for field in fields(self))
    return f"{type(self).__name__}({', '.join(shown)})"
