"""Files of claims: their schema, and how they are read. Importing this module loads pydantic, and no torch."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lumiere.config.loader import read_config
from lumiere.config.schema import read_integer, read_number
from lumiere.errors import LumiereError, printable, quoted

HEAD = re.compile(r"L(\d+)H(\d+)")
Head = Annotated[str, Field(pattern=rf"^{HEAD.pattern}$")]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,40}$")]


Number = Annotated[float, BeforeValidator(read_number)]
Integer = Annotated[int, BeforeValidator(read_integer)]
"""Text that spells a number counts as one: the reader of files leaves it to the schema, so that `yes` is no boolean."""


class Strict(BaseModel):
    """A part of a file, in which unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Expectation(Strict):
    """What is claimed of a number: `op` and `value`, or `equivalent: d` for an effect between -d and d."""

    op: Literal[">=", "<="] | None = None
    value: Number | None = None
    equivalent: Annotated[Number, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "Expectation":
        if (self.equivalent is None) == (self.op is None) or (self.op is None) != (self.value is None):
            raise ValueError("give either op and value, or equivalent")
        return self

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest value that it allows."""
        if self.equivalent is not None:
            return -self.equivalent, self.equivalent
        assert self.value is not None
        return (self.value, math.inf) if self.op == ">=" else (-math.inf, self.value)

    def __str__(self) -> str:
        return f"within ±{self.equivalent:g}" if self.equivalent is not None else f"{self.op} {self.value:g}"


class Data(Strict):
    """What a number is measured on: windows of the validation split, repeated random tokens, or one text."""

    source: Literal["validation", "repeated", "prompt"] = "validation"
    prompt: str | None = None
    length: Annotated[Integer, Field(ge=2, le=2**16)] | None = None
    batches: Integer = Field(default=8, ge=1, le=2**16)
    seed: Integer = Field(default=0, ge=0, le=2**63)

    @model_validator(mode="after")
    def _text(self) -> "Data":
        if (self.source == "prompt") != (self.prompt is not None):
            raise ValueError("source: prompt and prompt: TEXT belong together")
        if self.length is not None and self.source != "repeated":
            raise ValueError("length is that of source: repeated")
        return self


class Claim(Strict):
    id: Id
    expect: Expectation
    data: Data | None = None


class HeadScore(Claim):
    """A head's mean attention to the tokens that a role names, as `inspect heads`."""

    kind: Literal["head_score"]
    head: Head
    score: Literal["previous", "current", "first", "duplicate", "induction"]

    def __str__(self) -> str:
        return f"{self.head} {self.score} score {self.expect}"


class Ablate(Claim):
    """By how much the loss rises without a head, in nats per token, as `inspect ablate`."""

    kind: Literal["ablate"]
    units: list[Head] = Field(min_length=1, max_length=1)
    mode: Literal["mean", "zero", "resample"] = "mean"
    metric: Literal["loss"] = "loss"

    def __str__(self) -> str:
        return f"loss without {self.units[0]} ({self.mode}) changes {self.expect}"


class Metric(Claim):
    """A number of the whole model, as `inspect heads` prints it below the table, in nats per token."""

    kind: Literal["metric"]
    metric: Literal["repeat_gap", "text_gap", "in_context_score"]

    def __str__(self) -> str:
        return f"{self.metric} {self.expect}"


class Composes(Claim):
    """How strongly a head's queries, keys or values read what an earlier one writes, in multiples of chance."""

    kind: Literal["composition"]
    earlier: Head
    later: Head
    by: Literal["q", "k", "v"]

    def __str__(self) -> str:
        return f"{self.earlier} to {self.later} by {self.by}, x chance {self.expect}"


class Direction(Strict):
    """A direction that `inspect steer` or `inspect probe` has saved, or that of a token's logit."""

    file: str | None = None
    token: str | None = None
    layer: Integer | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "Direction":
        if (self.file is None) == (self.token is None):
            raise ValueError("give either file or token")
        return self


class Steer(Claim):
    """By how much a direction of the residual stream moves a prediction at a dose, as `inspect steer`."""

    kind: Literal["steer"]
    direction: Direction
    target: str
    vs: str | None = None
    dose: Number

    def __str__(self) -> str:
        measured = self.target if self.vs is None else f"{self.target} - {self.vs}"
        return printable(f"{quoted(measured)} at dose {self.dose:g} changes {self.expect}")


AnyClaim = Annotated[HeadScore | Ablate | Metric | Composes | Steer, Field(discriminator="kind")]


class Level(Strict):
    level: Number = Field(default=0.95, gt=0.5, lt=1)


class Defaults(Strict):
    data: Data = Data()
    ci: Level = Level()
    correction: Literal["holm", "none"] = "holm"


class Runs(Strict):
    any: list[str] = Field(default=["latest"], min_length=1)
    require: Literal["all"] | Integer = "all"


class ClaimFile(Strict):
    """A file of claims.

    Attributes:
        runs: Runs, as `--run` takes them, and how many of them have to pass.
        primary: Ids of the claims that are corrected for each other; the others are decided alone. Default: all.
    """

    format: Annotated[Literal[1], BeforeValidator(read_integer)]
    defaults: Defaults = Defaults()
    runs: Runs = Runs()
    primary: list[Id] | None = None
    claims: list[AnyClaim] = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _ids(self) -> "ClaimFile":
        ids = [claim.id for claim in self.claims]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"two claims have the id {twice[0]}")
        if missing := sorted(set(self.primary or ()) - set(ids)):
            raise ValueError(f"primary names {missing[0]}, and there is no such claim")
        return self


def read_claims(path: str | Path) -> ClaimFile:
    """Read a file of claims.

    Raises:
        LumiereError: It cannot be read, or does not have the format; names the first problem.
    """
    values = read_config(Path(path))
    try:
        return ClaimFile.model_validate(values)
    except ValidationError as error:
        raise LumiereError(problem(path, values, error), "docs/causes.md describes the format") from None


def problem(path: str | Path, values: dict[str, Any], error: ValidationError) -> str:
    """Say what is wrong with the first thing that is, and where."""
    detail = error.errors(include_url=False)[0]
    place = [str(part) for part in detail["loc"]]
    claims = values.get("claims")
    if place[:1] == ["claims"] and len(place) > 1 and place[1].isdigit() and isinstance(claims, list):
        claim = claims[int(place[1])]
        name = claim.get("id") if isinstance(claim, dict) else None
        kind = claim.get("kind") if isinstance(claim, dict) else None
        rest = [part for part in place[2:] if part != kind]
        place = [f"claim {name or int(place[1]) + 1}", *rest]
    where = f" at {quoted('.'.join(place))}" if place else ""
    message = detail["msg"].removeprefix("Value error, ")
    return printable(f"{quoted(path)} is no file of claims: {message[:1].lower()}{message[1:]}{where}")


def place_of(head: str) -> tuple[int, int]:
    """Return the layer and the number of a head such as L1H0."""
    match = HEAD.fullmatch(head)
    assert match is not None
    return int(match[1]), int(match[2])
