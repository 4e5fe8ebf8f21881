"""`lumiere inspect claims`: verdicts and exit codes, and files that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

import lumiere
from lumiere.api.claims import check_file
from lumiere.config.loader import validate
from lumiere.persistence.runs import Run
from tests.cli.commands import invoke, refuse
from tests.conftest import TINY, train_session_run

REPEATED = {"source": "repeated", "length": 5}
SCORE = {"id": "attends", "kind": "head_score", "head": "L1H0", "score": "first", "data": REPEATED}
ALWAYS, NEVER = {"op": ">=", "value": 0}, {"op": ">=", "value": 1.5}
IDLE = {
    "id": "idle",
    "kind": "ablate",
    "units": ["L0H1"],
    "expect": {"equivalent": 5},
    "data": REPEATED | {"batches": 2},
}
GAP = {"id": "gap", "kind": "metric", "metric": "repeat_gap", "data": REPEATED}
READS = {"id": "reads", "kind": "composition", "earlier": "L0H0", "later": "L1H1", "by": "k"}

TOGETHER = {"id": "backup", "kind": "interaction", "units": ["L0H0", "L1F"], "data": REPEATED | {"batches": 2}}
PAIR = {"clean": "abc", "corrupt": "aac", "target": "d", "vs": "e"}
CIRCUIT = {"id": "edges", "kind": "circuit", "pair": PAIR, "edges": ["embed->logits"]}
LABEL = {"property": "token", "classes": 2}
PROBE = {"id": "reads", "kind": "probe", "label": LABEL, "stage": "embedding", "stat": "accuracy"}


def written(*claims: dict[str, Any], **more: Any) -> str:
    Path("claims.yaml").write_text(json.dumps({"format": 1, "claims": list(claims), **more}))  # which is YAML
    return "claims.yaml"


@pytest.fixture(scope="module")
def many_documents(tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path) -> Run:
    """A run with enough documents for the three parts of a probe. Read-only."""
    data = TINY["dataset"] | {"num_documents": 100, "validation_fraction": 0.5}
    config = validate(TINY | {"dataset": data, "training": TINY["training"] | {"max_steps": 4}})
    return train_session_run(config, tmp_path_factory.mktemp("many_documents"), corpus_cache)


def test_claims_that_hold(run: Run) -> None:
    file = written(SCORE | {"expect": ALWAYS}, IDLE, GAP | {"expect": {"equivalent": 9}}, READS | {"expect": ALWAYS})
    result = invoke("inspect", "claims", file)
    assert max(len(line) for line in result.stdout.splitlines() if not line.startswith("receipt")) <= 80
    data = json.loads(invoke("inspect", "claims", file, "--json", "--control", "untrained").stdout)
    assert [claim["verdict"] for claim in data["claims"]] == ["pass"] * 4
    for claim in data["claims"]:
        [own] = claim["runs"]
        assert own["low"] <= own["estimate"] <= own["high"]
        assert own["level"] == pytest.approx(1 - 0.05 / 4)
    opened = lumiere.open("latest")
    found = opened.inspect.heads(random=5)
    assert data["claims"][0]["runs"][0]["estimate"] == found.scores[1, 0, found.score_names.index("first")]
    ablation = opened.inspect.ablate(layer=0, head=1, batches=2, random=5)
    assert data["claims"][1]["runs"][0]["estimate"] == ablation.changes[0]
    assert check_file(file, [opened, opened.at(0)]).verdicts == ("pass",) * 4


def test_a_claim_that_fails_ends_with_three(run: Run) -> None:
    file = written(SCORE | {"expect": NEVER})
    assert "attends" in invoke("inspect", "claims", file, code=3).stderr
    either = written(SCORE | {"expect": NEVER}, runs={"any": ["latest", "latest@0"], "require": 1})
    invoke("inspect", "claims", either, code=3)


def test_an_undecided_claim_ends_with_three_if_strict(run: Run) -> None:
    found = lumiere.open("latest").inspect.heads(random=5)
    value = float(found.scores[1, 0, found.score_names.index("first")])
    file = written(SCORE | {"expect": {"op": ">=", "value": value}})
    assert "undecided" in invoke("inspect", "claims", file).stdout
    invoke("inspect", "claims", file, "--strict", code=3)


def test_a_joint_ablation_is_that_of_ablate_together(run: Run) -> None:
    file = written(TOGETHER | {"expect": {"equivalent": 5}})
    [decision] = check_file(file, [lumiere.open("latest")]).decisions[0]
    found = lumiere.open("latest").inspect.ablate(together="L0H0+L1F", batches=2, random=5)
    assert (decision.estimate.value, decision.estimate.error) == (found.interactions[0], found.interaction_errors[0])


def test_all_edges_together_do_everything(run: Run) -> None:
    """A file of pairs beside the file of claims has an interval; one pair is exact."""
    Path("shipped").mkdir()
    lines = [json.dumps(PAIR | {"clean": f"{letter}bc", "corrupt": f"{letter}ac"}) for letter in "12345678"]
    Path("shipped", "pairs.jsonl").write_text("\n".join(lines))
    opened = lumiere.open("latest")
    every = list(opened.inspect.circuit("abc", "aac", target="d", vs="e").names)
    expect = {"faithfulness": {"op": ">=", "value": 0.999}, "outside_max_effect": {"op": "<=", "value": 0.001}}
    many = {key: value for key, value in CIRCUIT.items() if key != "pair"} | {"prompts": "pairs.jsonl"}
    file = Path(
        "shipped",
        written(CIRCUIT | {"edges": every, "expect": expect}, many | {"id": "many", "edges": every, "expect": expect}),
    )
    Path(file.name).rename(file)
    result = check_file(file, [opened])
    assert result.claims == (
        "edges.faithfulness",
        "edges.outside_max_effect",
        "many.faithfulness",
        "many.outside_max_effect",
    )
    assert result.verdicts == ("pass",) * 4
    assert [own.estimate.units for [own] in result.decisions] == [0, 0, 8, 8]
    assert "exact" in invoke("inspect", "claims", str(file)).stdout


def test_a_probe_of_two_tokens_reads_them_and_memorizes_them(many_documents: Run) -> None:
    """Two tokens are told apart by their embeddings, and so are their two random classes: no selectivity."""
    readable = PROBE | {"expect": {"op": ">=", "value": 0.99}}
    chosen = PROBE | {"id": "chosen", "stat": "selectivity", "control_seeds": 3, "expect": {"equivalent": 0.01}}
    unseen = chosen | {"id": "unseen", "label": {"regex": "[aeiou]"}, "expect": {"equivalent": 1}}
    opened = lumiere.open(many_documents.path)
    result = check_file(written(readable, chosen, unseen), [opened])
    assert result.verdicts == ("pass",) * 3
    found = opened.inspect.probe(regex="[aeiou]", layer=0, control_seeds=3)
    assert found.control.shape[1] == 3
    assert found.test_counts[0].sum() > found.test_counts[1].sum()
    assert result.decisions[2][0].estimate.value == pytest.approx(found.selectivity[0])
    assert [own.estimate.units for [own] in result.decisions] == [found.num_documents[2]] * 3


def test_a_steering_claim_names_a_dose_that_is_tried(run: Run) -> None:
    steer = {"id": "moves", "kind": "steer", "direction": {"token": "70"}, "target": "70", "expect": ALWAYS}
    assert "no dose 0.3" in refuse("inspect", "claims", written(steer | {"dose": 0.3}))[0]
    both = steer | {"dose": 0.2, "direction": {"token": "70", "file": "d.safetensors"}}
    assert "either file or token" in refuse("inspect", "claims", written(both))[0]
    opened = lumiere.open("latest")
    effects = opened.inspect.steer(token="70", target="70").effects
    if len(effects) >= 8:
        data = json.loads(invoke("inspect", "claims", written(steer | {"dose": 0.2}), "--json").stdout)
        assert data["claims"][0]["runs"][0]["estimate"] == pytest.approx(effects[:, -2].mean())
    else:
        assert "too few" in refuse("inspect", "claims", written(steer | {"dose": 0.2}))[0]


@pytest.mark.parametrize(
    ("claim", "named"),
    [
        (SCORE, "claim attends"),
        (SCORE | {"expect": {"op": ">="}}, "either op and value, or equivalent"),
        (SCORE | {"expect": ALWAYS, "hed": "L0H0"}, "claim attends.hed"),
        (SCORE | {"expect": ALWAYS, "head": "1.0"}, "claim attends.head"),
        (SCORE | {"expect": ALWAYS, "head": "L7H0"}, "no head L7H0"),
        (SCORE | {"expect": ALWAYS, "score": "best"}, "claim attends.score"),
        (SCORE | {"expect": ALWAYS, "data": {}}, "repeated random tokens, or on a prompt"),
        (SCORE | {"expect": ALWAYS, "data": {"source": "prompt"}}, "belong together"),
        (SCORE | {"expect": ALWAYS, "data": {"source": "prompt", "prompt": "One day"}}, "too few for an interval"),
        (SCORE | {"expect": ALWAYS, "kind": "guess"}, "claim attends"),
        (READS | {"expect": ALWAYS, "earlier": "L1H0"}, "not in an earlier layer"),
        (IDLE | {"units": ["L0H0", "L0H1"]}, "claim idle.units"),
        (TOGETHER | {"expect": ALWAYS, "units": ["L0H0"]}, "claim backup.units"),
        (TOGETHER | {"expect": ALWAYS, "units": ["L0H0", "L9H0"]}, "no layer 9"),
        (CIRCUIT | {"expect": ALWAYS}, "claim edges.expect.op"),
        (CIRCUIT | {"expect": {}}, "give faithfulness"),
        (CIRCUIT | {"expect": {"faithfulness": ALWAYS}, "prompts": "p.jsonl"}, "either prompts or pair"),
        (CIRCUIT | {"expect": {"faithfulness": ALWAYS}, "ablation": "none"}, "claim edges.ablation"),
        (CIRCUIT | {"expect": {"faithfulness": ALWAYS}, "edges": ["embed->logit"]}, "no edge 'embed->logit'"),
        (PROBE | {"expect": ALWAYS, "stage": "L9", "data": {}}, "no layer 9"),
        (PROBE | {"expect": ALWAYS, "stat": "auc"}, "claim reads.stat"),
        (PROBE | {"expect": ALWAYS, "data": REPEATED}, "validation split"),
    ],
)
def test_what_is_no_claim_is_refused(run: Run, claim: dict[str, Any], named: str) -> None:
    assert named in refuse("inspect", "claims", written(claim))[0]


def test_what_is_no_file_of_claims_is_refused(run: Run) -> None:
    good = SCORE | {"expect": ALWAYS}
    for values, named in (
        ({"format": 2}, "format"),
        ({"claims": []}, "claims"),
        ({"claims": [good, dict(good, expect={"equivalent": 1})]}, "two claims have the id attends"),
        ({"primary": ["other"]}, "primary names other"),
        ({"runs": {"any": ["latest"], "require": 2}}, "2 of 1 runs"),
        ({"defaults": {"ci": {"level": 2}}}, "defaults.ci.level"),
    ):
        assert named in refuse("inspect", "claims", written(good, **values))[0]
    assert "none.yaml" in refuse("inspect", "claims", "none.yaml")[0]
    assert "control" in refuse("inspect", "claims", written(good), "--control", "trained")[0]


@pytest.mark.slow
def test_the_claims_of_the_readme_hold() -> None:
    invoke("train", "tiny")
    story = Path(lumiere.__file__).parents[1] / "configs" / "claims" / "story.yaml"
    invoke("inspect", "claims", str(story), "--strict")
