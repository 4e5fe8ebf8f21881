"""`inspect steer --save` and `generate --steer`: the same text with the cache, its count, and what is refused."""

import json
from pathlib import Path

import pytest

import lumiere
from lumiere.generation.steering import Steering
from lumiere.persistence.runs import Run
from tests.cli.commands import invoke, refuse

GREEDY = ("generate", "--prompt=Once upon", "--greedy", "-n", "24")


@pytest.fixture
def direction() -> str:
    Path("good.txt").write_text("One day a fox\nOnce upon a time\nA hen was here\nThe fox ran\n")
    Path("bad.txt").write_text("two two\n\nThe end of it\nno no no\nIn a box\n")
    options = ("--target=e", "--vs=a", "--batches=1", "--batch-size=2", "--layer=0", "--save=d.safetensors")
    found = json.loads(
        invoke("inspect", "steer", "--positive=good.txt", "--negative=bad.txt", *options, "--json").stdout
    )
    assert list(found["ranks"]) == ["random", "shuffled", "halves"]
    assert (found["layer"], len(found["vector"])) == (0, 16)
    return "d.safetensors"


def test_generated_text_is_steered_and_counted(run: Run, direction: str) -> None:
    plain = invoke(*GREEDY).stdout
    assert invoke(*GREEDY, "--steer", f"{direction}*0").stdout == plain
    result = invoke(*GREEDY, "--steer", f"{direction}@0,1*2", "--check")
    assert result.stdout != plain
    found = lumiere.open(run.path).generate("Once upon", temperature=0, max_new_tokens=24, steer=f"{direction}@0,1*2")
    assert f"{found}\n" == result.stdout
    again = invoke(*GREEDY, "--steer", f"{direction}@0,1*2", "--json").stdout
    assert json.loads(again)[0]["text"] == found.text
    several = invoke("generate", "--num-return-sequences=3", "-n", "9", "--steer", direction)
    assert "FAILED" not in several.stderr


def test_steering_that_does_not_act_everywhere_exits_with_3(
    run: Run, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = Steering.__init__

    def deaf(self: Steering, *arguments: object) -> None:
        init(self, *arguments)  # pyright: ignore[reportArgumentType]
        self.first, self.hooks = 1, {name: (lambda x: None) for name in self.hooks}

    monkeypatch.setattr(Steering, "__init__", deaf)
    assert "0 of " in invoke(*GREEDY, "--steer", direction, code=3).stderr


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("generate --steer none.safetensors", "none.safetensors"),
        ("generate --steer bad.txt", "bad.txt"),
        ("generate --steer d.safetensors@7", "no layer 7"),
        ("generate --steer d.safetensors*much", "much"),
        ("generate --steer d.safetensors -c 4", "other weights"),
        ("inspect steer", "--positive"),
        ("inspect steer --positive good.txt", "--negative"),
        ("inspect steer --positive good.txt --negative bad.txt", "--target"),
        ("inspect steer --positive good.txt --negative empty.txt --target e", "empty.txt"),
        ("inspect steer --positive good.txt --negative none.txt --target e", "none.txt"),
        ("inspect steer --positive good.txt --negative good.txt --target e", "is 0"),
        ("inspect steer --token e --direction d.safetensors", "--positive"),
        ("inspect steer --token e --vs e", "same token"),
        ("inspect steer --token zqx", "zqx"),
        ("inspect steer --token e --prompts good.txt --prompt One", "--prompts"),
        ("inspect steer --token e --save d.npz", "d.npz"),
        ("inspect steer --token e --save no/d.safetensors", "no/d"),
        ("inspect steer --direction d.safetensors --target e -c 4", "other weights"),
    ],
)
def test_bad_input_is_refused(run: Run, direction: str, command: str, named: str) -> None:
    Path("empty.txt").write_text("\n")
    assert named in " ".join(refuse(*command.split()))
