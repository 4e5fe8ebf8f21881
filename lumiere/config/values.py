"""How a value is read: strictly. A boolean is no number, text counts only where it reads as that number.

The values of a YAML file and of `--set` come as text, and plain pydantic reads `012` as 12 and `yes` as True; a config
that is silently not what was written costs somebody a run. These readers run before pydantic's own.
"""

import contextlib
import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from lumiere.files import MAX_INTEGER

# No two parts of it fit the same characters: of a long text that is no number, each is looked at once.
# Without leading zeros, which mean octal to some readers: 012.
NUMBER = re.compile(r"[+-]?((?:0|[1-9][0-9_]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def read_number(value: Any) -> float:
    """`value` as a finite float.

    Raises:
        PydanticCustomError: for booleans, NaN, infinities, and text that does not read as a number.
    """
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("number", "must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise PydanticCustomError("number", "must be a finite number")
    return number


def read_integer(value: Any) -> int:
    """`value` as a whole number; `2e3` counts, `2.5` does not."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        number = read_number(value)
    except PydanticCustomError:
        number = math.nan
    if not number.is_integer():
        raise PydanticCustomError("integer", "must be a whole number")
    # Text is read again as an integer, because a float holds whole numbers only up to 2^53.
    text = str(value).strip().replace("_", "")
    return int(text) if text.lstrip("+-").isdigit() else int(number)


def read_boolean(value: Any) -> bool:
    """`value` as true or false."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise PydanticCustomError("boolean", "must be true or false")
    return value


def read_names(value: Any) -> Any:
    """`value` as a list of names: `a, b` is one, which a shell writes more easily, and the empty value has none."""
    if value is None:
        return []
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


Integer = Annotated[int, BeforeValidator(read_integer)]
Number = Annotated[float, BeforeValidator(read_number)]
Boolean = Annotated[bool, BeforeValidator(read_boolean)]

PositiveInteger = Annotated[Integer, Field(ge=1, le=MAX_INTEGER)]
NonNegativeInteger = Annotated[Integer, Field(ge=0, le=MAX_INTEGER)]
Width = Annotated[Integer, Field(ge=1, le=1_000_000)]
Count = Annotated[Integer, Field(ge=1, le=1000)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NonNegativeNumber = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
