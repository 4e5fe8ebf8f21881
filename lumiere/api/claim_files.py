"""Files of claims: their schema, and how they are read. Importing this module loads pydantic, and no torch."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from lumiere.config.loader import read_config
from lumiere.config.schema import read_integer, read_number
from lumiere.errors import LumiereError, printable, quoted

HEAD = re.compile(r"L(\d+)H(\d+)")
Head = Annotated[str, Field(pattern=rf"^{HEAD.pattern}$")]
Part = Annotated[str, Field(pattern=r"^L\d+([HN]\d+|F)$")]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,40}$")]


Number = Annotated[float, BeforeValidator(read_number)]
Integer = Annotated[int, BeforeValidator(read_integer)]
"""Text that spells a number counts as one: the reader of files leaves it to the schema, so that `yes` is no boolean."""


def beside(file: str, info: ValidationInfo) -> str:
    """Return a path that is relative to the file of claims."""
    return str(Path((info.context or {}).get("folder", ".")) / file)


FileName = Annotated[str, AfterValidator(beside)]


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
    data: Data | None = None


class Single(Claim):
    """A claim about one number."""

    expect: Expectation


class HeadScore(Single):
    """A head's mean attention to the tokens that a role names, as `inspect heads`."""

    kind: Literal["head_score"]
    head: Head
    score: Literal["previous", "current", "first", "duplicate", "induction"]

    def __str__(self) -> str:
        return f"{self.head} {self.score} score {self.expect}"


class Ablate(Single):
    """By how much the loss rises without a head, in nats per token, as `inspect ablate`."""

    kind: Literal["ablate"]
    units: list[Head] = Field(min_length=1, max_length=1)
    mode: Literal["mean", "zero", "resample"] = "mean"
    metric: Literal["loss"] = "loss"

    def __str__(self) -> str:
        return f"loss without {self.units[0]} ({self.mode}) changes {self.expect}"


class Interaction(Single):
    """By how much the loss rises more without all parts than without each, as `inspect ablate --together`."""

    kind: Literal["interaction"]
    units: list[Part] = Field(min_length=2, max_length=64)
    mode: Literal["mean", "zero", "resample"] = "mean"
    metric: Literal["loss"] = "loss"

    def __str__(self) -> str:
        return f"loss without {'+'.join(self.units)} ({self.mode}), joint change minus sum, {self.expect}"


class Metric(Single):
    """A number of the whole model, as `inspect heads` prints it below the table, in nats per token."""

    kind: Literal["metric"]
    metric: Literal["repeat_gap", "text_gap", "in_context_score"]

    def __str__(self) -> str:
        return f"{self.metric} {self.expect}"


class Composes(Single):
    """How strongly a head's queries, keys or values read what an earlier one writes, in multiples of chance."""

    kind: Literal["composition"]
    earlier: Head
    later: Head
    by: Literal["q", "k", "v"]

    def __str__(self) -> str:
        return f"{self.earlier} to {self.later} by {self.by}, x chance {self.expect}"


class Direction(Strict):
    """A direction that `inspect steer` or `inspect probe` has saved, or that of a token's logit."""

    file: FileName | None = None
    token: str | None = None
    layer: Integer | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "Direction":
        if (self.file is None) == (self.token is None):
            raise ValueError("give either file or token")
        return self


class Steer(Single):
    """By how much a direction of the residual stream moves a prediction at a dose, as `inspect steer`."""

    kind: Literal["steer"]
    direction: Direction
    target: str
    vs: str | None = None
    dose: Number

    def __str__(self) -> str:
        measured = self.target if self.vs is None else f"{self.target} - {self.vs}"
        return printable(f"{quoted(measured)} at dose {self.dose:g} changes {self.expect}")


class Label(Strict):
    """What tokens are told apart by: whether a token matches, or which of the most frequent ones it is."""

    regex: str | None = None
    property: Literal["token", "next-token", "previous-token", "position"] = "token"
    classes: Integer = Field(default=4, ge=2, le=2**10)


class Probe(Single):
    """How well a linear probe reads a property off the residual stream at a stage, as `inspect probe`."""

    kind: Literal["probe"]
    label: Label
    stage: Annotated[str, Field(pattern=r"^(embedding|L\d{1,4})$")]
    stat: Literal["accuracy", "selectivity"]
    control_seeds: Integer = Field(default=5, ge=1, le=100)
    windows: Integer = Field(default=300, ge=1, le=2**16)

    def __str__(self) -> str:
        what = self.label.property
        if self.label.regex is not None:
            what += f" matches {self.label.regex}"
        return printable(f"{self.stat} of a probe at {self.stage}, {what}: {self.expect}")


class Pair(Strict):
    """A clean and a corrupt prompt, with the token that the first should predict and one to compare it with."""

    clean: str
    corrupt: str
    target: str | None = None
    vs: str | None = None


class CircuitNumbers(Strict):
    """What is claimed of the numbers of a circuit."""

    faithfulness: Expectation | None = None
    outside_max_effect: Expectation | None = None
    random_same_size: Expectation | None = None

    @model_validator(mode="after")
    def _any(self) -> "CircuitNumbers":
        if not any(expected is not None for _, expected in self):
            raise ValueError("give faithfulness, outside_max_effect or random_same_size")
        return self


class Circuit(Claim):
    """What edges do alone, what those outside do, and what random ones do, as `inspect circuit`.

    Attributes:
        prompts: A file of pairs, relative to the file of claims; or `pair`.
        ablation: What a cut edge carries.
    """

    kind: Literal["circuit"]
    prompts: FileName | None = None
    pair: Pair | None = None
    ablation: Literal["corrupt", "mean-per-position", "mean", "zero"] = "corrupt"
    edges: list[Annotated[str, Field(min_length=1, max_length=100)]] = Field(min_length=1)
    expect: CircuitNumbers

    @model_validator(mode="after")
    def _one_of_both(self) -> "Circuit":
        if (self.prompts is None) == (self.pair is None):
            raise ValueError("give either prompts or pair")
        return self

    def __str__(self) -> str:
        return f"circuit of {len(self.edges)} edge{'s' * (len(self.edges) > 1)} ({self.ablation})"


AnyClaim = Annotated[
    HeadScore | Ablate | Interaction | Metric | Composes | Steer | Probe | Circuit, Field(discriminator="kind")
]


@dataclass(frozen=True)
class Statement:
    """A claim about one number; `stat` names it where a claim is about several."""

    claim: AnyClaim
    expect: Expectation
    stat: str = ""

    @property
    def id(self) -> str:
        return f"{self.claim.id}.{self.stat}" if self.stat else self.claim.id

    def __str__(self) -> str:
        return f"{self.claim}: {self.stat} {self.expect}" if self.stat else str(self.claim)


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

    @property
    def statements(self) -> Iterator[Statement]:
        for claim in self.claims:
            if isinstance(claim, Circuit):
                yield from (Statement(claim, expect, stat) for stat, expect in claim.expect if expect is not None)
            else:
                yield Statement(claim, claim.expect)

    @model_validator(mode="after")
    def _ids(self) -> "ClaimFile":
        ids = [claim.id for claim in self.claims]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"two claims have the id {twice[0]}")
        if missing := sorted(set(self.primary or ()) - set(ids)):
            raise ValueError(f"primary names {missing[0]}, and there is no such claim")
        return self


def read_claims(path: str | Path) -> ClaimFile:
    """Read a file of claims; the files that it names are relative to it.

    Raises:
        LumiereError: It cannot be read, or does not have the format; names the first problem.
    """
    values = read_config(Path(path))
    try:
        return ClaimFile.model_validate(values, context={"folder": Path(path).parent})
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
    return printable(f"{quoted(path)} is not a claims file: {message[:1].lower()}{message[1:]}{where}")


def place_of(head: str) -> tuple[int, int]:
    """Return the layer and the number of a head such as L1H0."""
    match = HEAD.fullmatch(head)
    assert match is not None
    return int(match[1]), int(match[2])
