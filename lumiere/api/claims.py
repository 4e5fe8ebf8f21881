"""Check the claims of a file against runs. Importing this module loads neither torch nor numpy."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.errors import LumiereError

if TYPE_CHECKING:
    from lumiere.api.claim_files import (
        Ablate,
        Circuit,
        ClaimFile,
        Composes,
        Data,
        HeadScore,
        Interaction,
        Metric,
        Probe,
        Statement,
        Steer,
    )
    from lumiere.api.runs import OpenedRun
    from lumiere.interpret.claims import CheckedClaims, Estimate

FEWEST_UNITS = 8


class Measured:
    """The estimates of one model; analyses that several claims read are computed once."""

    def __init__(self, run: "OpenedRun") -> None:
        self.run, self.found = run, {}

    def estimate(self, statement: "Statement", data: "Data") -> "Estimate":
        """Return the number that a statement is about.

        Raises:
            LumiereError: The model has no such head, the data is missing, or there are too few independent units.
        """
        from lumiere.interpret.claims import Estimate

        claim = statement.claim
        found = getattr(self, f"_{claim.kind}")(claim, data)
        value, error, units, receipts, *draws = found[statement.stat] if statement.stat else found
        if units and (units < FEWEST_UNITS or error != error):
            raise LumiereError(
                f"claim {claim.id} rests on {units} independent texts of run {self.run.id}, too few for an interval",
                f"give it data with {FEWEST_UNITS} or more: validation windows, or repeated tokens",
            )
        return Estimate(float(value), float(error), int(units), tuple(receipts), *draws)

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self.found:
            self.found[key] = compute()
        return self.found[key]

    def _head(self, name: str) -> tuple[int, int]:
        from lumiere.api.claim_files import place_of

        (layer, head), model = place_of(name), self.run.config.model
        if layer >= model.num_layers or head >= model.num_heads:
            last = f"L{model.num_layers - 1}H{model.num_heads - 1}"
            raise LumiereError(f"run {self.run.id} has no head {name}", f"its heads are L0H0 to {last}")
        return layer, head

    def _heads(self, data: "Data") -> Any:
        text: dict[str, Any] = {"prompt": data.prompt} if data.source == "prompt" else {"random": data.length}
        return self._once(("heads", data), lambda: self.run.inspect.heads(**text, seed=data.seed))

    def _head_score(self, claim: "HeadScore", data: "Data") -> tuple[Any, ...]:
        layer, head = self._head(claim.head)
        if data.source == "validation":
            raise LumiereError(
                f"claim {claim.id}: a head score is measured on repeated random tokens, or on a prompt",
                "write data: {source: repeated}, or {source: prompt, prompt: TEXT}",
            )
        found = self._heads(data)
        number = found.score_names.index(claim.score)
        is_text = data.source == "prompt"
        units = int(found.num_destinations[number]) if is_text else len(found.tokens)
        return found.scores[layer, head, number], found.errors[layer, head, number], units, found.receipts

    def _metric(self, claim: "Metric", data: "Data") -> tuple[Any, ...]:
        found = self._heads(data)
        if claim.metric == "repeat_gap":
            return found.repeat_gap, found.repeat_gap_error, len(found.tokens), found.receipts
        if claim.metric == "text_gap":
            return found.text_gap, found.text_gap_error, found.text_documents or 1, found.receipts
        return found.in_context_score, found.in_context_error, found.in_context_documents or 1, found.receipts

    def _ablate(self, claim: "Ablate", data: "Data") -> tuple[Any, ...]:
        layer, head = self._head(claim.units[0])
        found = self._ablated(claim.mode, data, layer=layer, head=head)
        return found.changes[0], found.standard_errors[0], found.num_documents, found.receipts

    def _interaction(self, claim: "Interaction", data: "Data") -> tuple[Any, ...]:
        found = self._ablated(claim.mode, data, together="+".join(claim.units))
        return found.interactions[0], found.interaction_errors[0], found.num_documents, found.receipts

    def _ablated(self, mode: str, data: "Data", **parts: Any) -> Any:
        texts: dict[str, dict[str, Any]] = {
            "prompt": {"prompt": data.prompt},
            "repeated": {"random": data.length or 25},
        }
        own = {"mode": mode, "batches": data.batches, "seed": data.seed, **texts.get(data.source, {}), **parts}
        return self._once(("ablate", mode, data, *parts.values()), lambda: self.run.inspect.ablate(**own))

    def _composition(self, claim: "Composes", data: "Data") -> tuple[Any, ...]:
        place = (*self._head(claim.earlier), *self._head(claim.later))
        if place[0] >= place[2]:
            raise LumiereError(
                f"claim {claim.id}: {claim.earlier} is not in an earlier layer than {claim.later}",
                "heads compose with heads of later layers only",
            )
        found = self._once("weights", lambda: self.run.inspect.weights(layer=0, head=0, directions=1))
        [row] = (found.pairs == place).all(1).nonzero()[0]
        return found.scores[row, found.kinds.index(claim.by)] / found.chance, 0.0, 0, found.receipts

    def _steer(self, claim: "Steer", data: "Data") -> tuple[Any, ...]:
        import numpy as np

        way = claim.direction
        text: dict[str, Any] = {"prompt": data.prompt} if data.source == "prompt" else {}
        own: dict[str, Any] = {"direction": way.file, "token": way.token, "layer": way.layer, "target": claim.target}
        found = self.run.inspect.steer(**own, vs=claim.vs, **text, seed=data.seed)
        places = np.isclose(found.doses, claim.dose).nonzero()[0]
        if not len(places):
            raise LumiereError(
                f"claim {claim.id}: no dose {claim.dose:g} is tried",
                f"choose {', '.join(f'{x:g}' for x in found.doses)}",
            )
        effects = found.effects[:, places[0]]
        error = effects.std(ddof=1) / len(effects) ** 0.5 if len(effects) > 1 else 0.0
        return effects.mean(), error, len(effects), found.receipts

    def _circuit(self, claim: "Circuit", data: "Data") -> dict[str, tuple[Any, ...]]:
        import numpy as np

        from lumiere.api.pairs import read_pairs
        from lumiere.api.target import InspectTarget
        from lumiere.interpret.stated_circuit import state_circuit

        pair, opened = claim.pair, self.run.opened
        stats = [stat for stat, expected in claim.expect if expected is not None]

        def compute() -> Any:
            text = {"prompt": pair and pair.clean}
            found = InspectTarget(opened, text, data.seed, False, None, self.run.notify)
            one = (pair.corrupt, pair.target, pair.vs) if pair else (None, None, None)
            pairs, _ = read_pairs(found, *one, claim.prompts)
            return state_circuit(opened.model, pairs, claim.edges, stats, claim.ablation, data.seed)

        found = self._once(("circuit", claim.id), compute)
        estimates: dict[str, tuple[Any, ...]] = {}
        for stat, (value, *draws) in found.numbers.items():  # without resamples, it is exact for these pairs
            interval = (np.std(draws, ddof=1), found.num_groups) if draws else (0.0, 0)
            estimates[stat] = (value, *interval, found.receipts, np.array(draws) if draws else None)
        return estimates

    def _probe(self, claim: "Probe", data: "Data") -> tuple[Any, ...]:
        import numpy as np

        from lumiere.evaluation.scoring import clustered_means

        if data.source != "validation":
            raise LumiereError(
                f"claim {claim.id}: a probe reads windows of the validation split", "write data: {source: validation}"
            )
        layer = 0 if claim.stage == "embedding" else int(claim.stage[1:])
        own = {**claim.label.model_dump(), "windows": claim.windows, "control_seeds": claim.control_seeds}
        found = self._once(
            ("probe", layer, data, *own.values()), lambda: self.run.inspect.probe(layer=layer, **own, seed=data.seed)
        )
        number, stage = ("accuracy", "selectivity").index(claim.stat), found.stages.index(claim.stage)
        counts_D = found.test_counts[number]
        [value], [error] = clustered_means(found.test_sums[number, [stage]], counts_D, np.arange(len(counts_D)))
        return value, error, len(counts_D), found.receipts


def check_claims(file: "ClaimFile", runs: "Sequence[OpenedRun]", *, untrained: bool = False) -> "CheckedClaims":
    """Check every claim against every run.

    Args:
        untrained: Whether to check the runs' models before their first step, too.

    Raises:
        LumiereError: A claim does not fit a model, or rests on too few texts.
    """
    from lumiere.interpret.claims import CheckedClaims, joint_verdict
    from lumiere.interpret.result import Receipt

    need = len(runs) if file.runs.require == "all" else file.runs.require
    if not 1 <= need <= len(runs):
        raise LumiereError(f"{need} of {len(runs)} runs cannot pass", "set runs.require to all, or to a number of runs")
    by_run = [decided(file, run) for run in runs]
    controls = [decided(file, run.at(0)) for run in runs] if untrained else []
    by_claim = list(zip(*by_run, strict=True))
    receipts = [receipt for own in by_claim for decision in own for receipt in decision.estimate.receipts]
    worst = max((receipt.error / receipt.tolerance for receipt in receipts if receipt.tolerance), default=0.0)
    exact = [receipt for receipt in receipts if not receipt.tolerance and not receipt.holds]
    return CheckedClaims(
        claims=tuple(statement.id for statement in file.statements),
        statements=tuple(map(str, file.statements)),
        runs=tuple(f"{run.name}@{run.checkpoint}" for run in runs),
        required=need,
        decisions=tuple(by_claim),
        controls=tuple(zip(*controls, strict=True)),
        verdicts=tuple(joint_verdict([decision.verdict for decision in own], need) for own in by_claim),
        receipts=(
            Receipt("the checks of all analyses behind the claims, in units of their tolerance", worst, 1.0),
            Receipt("their exact checks", float(len(exact)), 0.0),
        ),
    )


def decided(file: "ClaimFile", run: "OpenedRun") -> list[Any]:
    """Decide the claims about one model: the primary ones together, the others alone."""
    from lumiere.interpret.claims import Bound, decide

    measured, defaults, stated = Measured(run), file.defaults, list(file.statements)
    estimates = [measured.estimate(each, each.claim.data or defaults.data) for each in stated]
    bounds = [Bound(*each.expect.limits) for each in stated]
    is_primary = [file.primary is None or each.claim.id in file.primary for each in stated]
    found: list[Any] = [None] * len(estimates)
    for group, holm in ((True, defaults.correction == "holm"), (False, False)):
        places = [number for number, primary in enumerate(is_primary) if primary == group]
        own = decide([estimates[n] for n in places], [bounds[n] for n in places], defaults.ci.level, holm)
        for number, decision in zip(places, own, strict=True):
            found[number] = decision
    return found


def check_file(path: str | Path, runs: "Sequence[OpenedRun]", *, untrained: bool = False) -> "CheckedClaims":
    """Check the claims of a file against opened runs; see `check_claims`."""
    from lumiere.api.claim_files import read_claims

    return check_claims(read_claims(path), runs, untrained=untrained)
