"""`lumiere generate`: what it prints, what it reads, what it refuses, and how a session behaves in a terminal."""

import json
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lumiere.cli import app
from lumiere.cli.generate import Settings
from lumiere.errors import LumiereError
from lumiere.persistence.runs import Run

PLAIN = Settings(0.8, None, None, None, None, None, None, 200, (), None)


@pytest.fixture
def call(trained_run: Run) -> Callable[..., str]:
    """The stdout of `lumiere generate`, which must succeed."""

    def run(*arguments: str, stdin: str | bytes | None = None, code: int = 0, stderr: bool = False) -> str:
        options = ["generate", "--runs-dir", str(trained_run.path.parent), *arguments]
        result = CliRunner().invoke(app, options, input=stdin)
        assert result.exit_code == code, result.output
        return result.stderr if stderr else result.stdout

    return run


def test_stdin_is_the_prompt(call: Callable[..., str]) -> None:
    options = ("-n", "10", "--seed", "1")
    expected = call("--prompt", "Once upon\na", *options)
    for text in ("Once upon\na\n", "Once upon\r\na\r\n", "\ufeffOnce upon\ra\r"):
        assert call("--prompt", "-", *options, stdin=text.encode()) == expected
        assert call("--prompt", text.strip(), *options) == expected
    assert "stdin, line 1" in call("--prompt", "-", stdin=b"\xff\xfe\xff", code=2, stderr=True)
    assert "the prompt is empty" in call("--prompt", "-", stdin="", code=2, stderr=True)


def test_many_prompts_become_json_lines(call: Callable[..., str]) -> None:
    Path("prompts.txt").write_bytes("\ufeffOnce upon a time\n\nThe fox\r\n".encode())
    lines = '{"prompt": "Once upon a time"}\n{"prompt": "The fox", "id": 7}\n'
    Path("prompts.jsonl").write_text(lines, encoding="utf-8")
    options = ("-n", "12", "--seed", "2", "--num-return-sequences", "2")
    records = [json.loads(line) for line in call("--prompts", "prompts.txt", *options).splitlines()]
    assert [record["prompt"] for record in records] == ["Once upon a time"] * 2 + ["The fox"] * 2
    assert all(record["num_tokens"] <= 12 and record["seed"] == 2 for record in records)
    assert len({record["text"] for record in records}) == 4
    again = [
        json.loads(line) for line in call("--prompts", "prompts.jsonl", *options, "--batch-size", "1").splitlines()
    ]
    assert again == records
    alone = call("--prompt", "Once upon a time", *options[:4])
    assert alone == f"{records[0]['prompt']}{records[0]['text']}\n"


def test_json(call: Callable[..., str]) -> None:
    options = ("--prompt", "The", "-n", "5", "--seed", "3")
    (record,) = json.loads(call(*options, "--json", "--logprobs", "2"))
    assert call(*options) == f"The{record['text']}\n"
    for token in record["tokens"]:
        assert len(token["alternatives"]) == 2
        assert token["logprob"] <= token["alternatives"][0]["logprob"] + 1e-9
    assert len(json.loads(call(*options, "--json", "--num-return-sequences", "3"))) == 3


def test_several_texts_have_a_line_between_them(call: Callable[..., str]) -> None:
    printed = call("--prompt", "The", "-n", "5", "--seed", "3", "--num-return-sequences", "2")
    assert [text.startswith("The") for text in printed.split("\n---\n\n")] == [True, True]


def test_logprobs_are_a_line_a_token(call: Callable[..., str]) -> None:
    lines = call("--prompt", "The", "-n", "5", "--seed", "3", "--logprobs", "2", "--stop", "zzzz").splitlines()
    assert len(lines) <= 5
    for line in lines:
        assert re.fullmatch(r"\S+ +-?\d+\.\d{3} +\d+\.\d%(  \S+ \d+\.\d%){2}", line), line


def test_color_leaves_the_text_as_it_is(call: Callable[..., str]) -> None:
    options = ("--prompt", "The", "-n", "30", "--seed", "3")
    assert call(*options, "--color") == call(*options)


def test_beams(call: Callable[..., str]) -> None:
    options = ("--prompt", "The", "-n", "5", "--num-beams", "3", "--num-return-sequences", "2", "--json")
    records = json.loads(call(*options))
    assert records[0]["score"] >= records[1]["score"]
    assert "seed" not in records[0]


def test_greedy_is_temperature_0(call: Callable[..., str]) -> None:
    options = ("--prompt", "The", "-n", "10")
    assert call(*options, "--greedy") == call(*options, "--temperature", "0")


def test_the_check_says_what_it_compared(call: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lumiere.generation.kv_cache import CacheCheck
    from lumiere.generation.text import TextGenerator

    options = ("--prompt", "The", "-n", "30", "--seed", "3", "--check")
    assert re.search(r"passed: \d+ cached steps", call(*options, stderr=True))
    monkeypatch.setattr(TextGenerator, "check", lambda self, generation: CacheCheck(9, 0.5, 1e-4))
    assert "FAILED: 9 cached steps" in call(*options, code=3, stderr=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--prompt a --prompts f", "--prompt and --prompts"),
        ("--interactive --prompt a", "--prompt and --interactive"),
        ("--interactive --json", "--interactive and --json"),
        ("--color --json", "--color and --json"),
        ("--greedy --temperature 1", "--temperature has no effect"),
        ("--temperature 0 --top-k 5", "--top-k has no effect"),
        ("--num-beams 2 --top-p 0.5", "--top-p has no effect"),
        ("--num-beams 2 --greedy", "--greedy has no effect"),
        ("--num-beams 2 --stop a", "--stop has no effect"),
        ("--num-beams 2 --num-return-sequences 3", "2 beams cannot give 3 texts"),
        ("--greedy --num-return-sequences 3", "temperature 0 gives the same text 3 times"),
        ("--min-p 2", "min-p must be from 0 to 1"),
        ("--typical-p 0", "typical-p must be more than 0"),
        ("--repetition-penalty 0", "the repetition penalty must be more than 0"),
        ("--no-repeat-ngram-size 0", "n-grams that may not repeat must be at least 1"),
        ("--prompts none.txt", "none.txt cannot be read"),
        ("--prompts blank.txt", "blank.txt holds no prompt"),
        ("--prompts bad.jsonl", "bad.jsonl, line 2"),
        ("--prompts keys.jsonl", "keys.jsonl, line 1"),
        ("--prompts empty.jsonl", "empty.jsonl, line 1: the prompt is empty"),
        ("--prompts latin.txt", "latin.txt, line 1"),
    ],
)
def test_refused(call: Callable[..., str], arguments: str, message: str) -> None:
    Path("blank.txt").write_text("\n \n")
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"prompt":\n')
    Path("keys.jsonl").write_text('{"text": "a"}\n')
    Path("empty.jsonl").write_text('{"prompt": ""}\n')
    Path("latin.txt").write_bytes(b"\xe9t\xe9")
    printed = call(*arguments.split(), code=2, stderr=True)
    assert message in printed
    assert "hint:" in printed
    stop = call("--stop", "", code=2, stderr=True)
    assert "a stop string is empty" in stop


def test_settings_are_read_like_options() -> None:
    assert PLAIN.changed("temperature", "0.5").temperature == 0.5
    assert PLAIN.changed("top-k", "4").changed("top_k", "none").top_k is None
    assert PLAIN.changed("stop", "a\\nö").stop == ("a\nö",)
    assert PLAIN.changed("stop", "a").changed("stop", "none").stop == ()
    for name, text, message in [
        ("top_l", "1", "no setting 'top_l'"),
        ("top_k", "many", "top_k must be a number, not 'many'"),
        ("top_k", "0", "top-k must be at least 1"),
        ("max_new_tokens", "none", "max_new_tokens must be a number"),
    ]:
        with pytest.raises(LumiereError, match=message) as caught:
            PLAIN.changed(name, text)
        assert caught.value.hint


def test_a_session_keeps_its_texts_and_settings(call: Callable[..., str]) -> None:
    script = "/set temperature 0\n/set max_new_tokens 4\nThe\n\n/history\n/settings\n/sett 1\n/quit\nnever\n"
    printed = call("--interactive", stdin=script)
    first = call("--prompt", "The", "-n", "4", "--greedy").removesuffix("\n")
    assert first in printed
    [history] = re.findall(r"^(?:> )?1\. (The.*)", printed, re.MULTILINE)
    # The empty line went on from the first text.
    assert history.startswith(first)
    assert len(history) > len(first)
    assert "temperature           0.0" in printed
    assert "never" not in printed
    assert "did you mean /set?" in call("--interactive", stdin="/sett 1\n", stderr=True)
    assert "there is no setting" in call("--interactive", stdin="/set a 1\n", stderr=True)
    assert "the prompt is empty" not in call("--interactive", stdin="\n", stderr=True)


@pytest.mark.skipif(not hasattr(os, "forkpty"), reason="a terminal of its own needs a POSIX system")
def test_ctrl_c_in_a_terminal(trained_run: Run) -> None:
    """An endless text is interrupted, at the prompt an interrupt is a note, and the session answers."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        # Whoever runs the tests in the background may have had interrupts ignored, and that is inherited.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        arguments = ["generate", "--interactive", "-n", "100000000", "--runs-dir", str(trained_run.path.parent)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        os.execve(sys.executable, [sys.executable, "-m", "lumiere", *arguments], environment)
    shown = b""

    def wait_for(*texts: bytes, key: bytes = b"") -> None:
        """Read until one of `texts` comes; `key` is pressed now, and again whenever a second passes without output.

        For Python's readline notices an interrupt that comes in the instant before it waits only with the next key.
        """
        nonlocal shown
        os.write(terminal, key)
        for _ in range(1000):
            if found := [text for text in texts if text in shown]:
                shown = shown.partition(found[0])[2]
                return
            if select.select([terminal], [], [], 1 if key else 120)[0]:
                shown += os.read(terminal, 4096)
            else:
                os.write(terminal, key)
        raise AssertionError(f"waiting for {texts} after {shown[-300:]}")

    try:
        wait_for(b"> ")
        os.write(terminal, b"/set repetition_penalty 1.1\n")
        wait_for(b"> ")
        os.write(terminal, b"Once\n")
        wait_for(b"Once\r\n")
        wait_for(b"Once")
        # The model may have ended the document itself: then the interrupt meets the prompt, which says so. Nothing
        # shorter than these notes is waited for, because a model as small as this one writes anything.
        wait_for(b" stopped", b"/quit or Ctrl-D", key=b"\x03")
        os.write(terminal, b"/settings\n")
        wait_for(b"repetition_penalty    1.1")
        wait_for(b"\nseed ")
        wait_for(b"> ")
        wait_for(b"/quit or Ctrl-D", key=b"\x03")
        wait_for(b"> ")  # only now keys are read one by one, and Ctrl-D is one
        os.write(terminal, b"\x04")
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


def test_ctrl_c_stops_the_text_and_not_the_session(call: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes after a first piece; what was written stays, and the session answers."""
    from lumiere.generation.decoding import Piece
    from lumiere.generation.text import TextGenerator

    def interrupted(*arguments: object) -> Iterator[Piece]:
        yield Piece(0, " upon", None)
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "stream", interrupted)
    script = "Once\n/history\n/settings\n/quit\n"
    printed = call("--interactive", stdin=script)
    assert "1. Once upon\n" in printed
    assert "temperature           0.8" in printed
    assert " stopped" in call("--interactive", stdin=script, stderr=True)
