"""Verdicts on statements about models: by intervals, never by points, and corrected for how many there are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from lumiere.interpret.bootstrap import limits
from lumiere.interpret.result import Receipt, Result

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"
LEVEL = 0.95


@dataclass(frozen=True)
class Bound:
    """The values that a claim allows: from `low` to `high`, each of which may be infinite."""

    low: float
    high: float

    def verdict(self, low: float, high: float) -> str:
        """Pass if the whole interval is allowed, fail if none of it is, else undecided; NaN decides nothing."""
        if low >= self.low and high <= self.high:
            return PASS
        return FAIL if high < self.low or low > self.high else UNDECIDED


@dataclass(frozen=True)
class Estimate:
    """A number of one model.

    Attributes:
        value: the estimate.
        error: its standard error; 0 for what is computed from the weights, without drawing anything.
        units: how many independent units it averages; 0 for what is exact, without an interval.
        receipts: of the analysis behind it.
        draws: the number in each resample of the units, where the interval is that of the bootstrap.
    """

    value: float
    error: float
    units: int
    receipts: tuple[Receipt, ...] = ()
    draws: np.ndarray | None = None

    def interval(self, level: float) -> tuple[float, float]:
        """Return `value ± t error` with the quantile of Student's t for one unit less, or percentiles of `draws`."""
        if self.draws is not None:
            low, high = limits(self.draws, level)
            return float(low), float(high)
        if self.units == 0:
            return self.value, self.value
        reach = student_quantile((1 + level) / 2, self.units - 1) * self.error
        return self.value - reach, self.value + reach


def student_quantile(p: float, freedom: int) -> float:
    """Return a quantile of Student's t for 7 degrees of freedom or more, by its expansion about the normal one.

    Abramowitz & Stegun 1964, "Handbook of Mathematical Functions", 26.7.5, with four terms.
    """
    z, n = NormalDist().inv_cdf(p), freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, 1))


def decide(estimates: Sequence[Estimate], bounds: Sequence[Bound], level: float, holm: bool) -> list["Decision"]:
    """Decide the claims about one model.

    With Holm's correction (1979, "A Simple Sequentially Rejective Multiple Test Procedure"), intervals have the level
    1 - alpha / m for m claims; the m' that they leave undecided are decided again at 1 - alpha / m', until none is.
    """
    found: dict[int, Decision] = {}
    open_claims = list(range(len(estimates)))
    while open_claims:
        used = 1 - (1 - level) / len(open_claims) if holm else level
        tried = {}
        for number in open_claims:
            low, high = estimates[number].interval(used)
            tried[number] = Decision(estimates[number], low, high, used, bounds[number].verdict(low, high))
        left = [number for number in open_claims if tried[number].verdict == UNDECIDED]
        found |= tried
        if len(left) == len(open_claims) or not holm:
            break
        open_claims = left
    return [found[number] for number in range(len(estimates))]


@dataclass(frozen=True)
class Decision:
    """The verdict on a claim about one model, with the interval that decided it."""

    estimate: Estimate
    low: float
    high: float
    level: float
    verdict: str


def joint_verdict(verdicts: Sequence[str], required: int) -> str:
    """Return the verdict on several models of which `required` have to pass."""
    if verdicts.count(PASS) >= required:
        return PASS
    return FAIL if len(verdicts) - verdicts.count(FAIL) < required else UNDECIDED


@dataclass(frozen=True, kw_only=True)
class CheckedClaims(Result):
    """The verdicts on the claims of a file.

    Attributes:
        claims: their ids.
        statements: each in words.
        runs: the models, as `RUN@CHECKPOINT`.
        required: how many of them have to pass.
        decisions: by claim, then by run.
        controls: the same for the untrained models; empty without that control.
        verdicts: by claim, over all runs.
    """

    claims: tuple[str, ...]
    statements: tuple[str, ...]
    runs: tuple[str, ...]
    required: int
    decisions: tuple[tuple[Decision, ...], ...]
    controls: tuple[tuple[Decision, ...], ...]
    verdicts: tuple[str, ...]

    def says_nothing(self, number: int) -> bool:
        """Return whether the untrained models pass as well."""
        own = self.controls[number] if self.controls else ()
        return bool(own) and joint_verdict([decision.verdict for decision in own], self.required) == PASS

    def as_dict(self) -> dict[str, Any]:
        """Return one entry a claim."""
        claims = [
            {
                "id": name,
                "statement": statement,
                "verdict": verdict,
                "runs": [as_json(*each) for each in zip(self.runs, self.decisions[number], strict=True)],
                "untrained": [as_json(*each) for each in zip(self.runs, self.controls[number], strict=True)]
                if self.controls
                else None,
            }
            for number, (name, statement, verdict) in enumerate(
                zip(self.claims, self.statements, self.verdicts, strict=True)
            )
        ]
        return {"claims": claims, "required": self.required}

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for name, decisions in zip(self.claims, self.decisions, strict=True):
            for run, decision in zip(self.runs, decisions, strict=True):
                yield {"claim": name, **as_json(run, decision)}


def as_json(run: str, decision: Decision) -> dict[str, Any]:
    estimate = decision.estimate
    return {
        "run": run,
        "estimate": estimate.value,
        "standard_error": estimate.error,
        "units": estimate.units,
        "low": decision.low,
        "high": decision.high,
        "level": decision.level,
        "verdict": decision.verdict,
    }
