"""`lumiere generate`: what it prints, what it reads, what it refuses, and how a session behaves in a terminal."""

import json
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumiere.cli.generate import SESSION_COMMANDS, Settings
from lumiere.errors import LumiereError
from lumiere.generation.decoding import Limits
from lumiere.generation.sampling import Sampling
from lumiere.persistence.runs import Run
from tests.cli.commands import invoke, read_json, refuse, stdout_of


@pytest.fixture(autouse=True)
def runs_dir(trained_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMIERE_RUNS_DIR", str(trained_run.path.parent))


def call(*arguments: str, text: str | bytes | None = None) -> str:
    return stdout_of("generate", *arguments, text=text)


def notes(*arguments: str, text: str | None = None, code: int = 0) -> str:
    return invoke("generate", *arguments, text=text, code=code).stderr


def test_stdin_is_the_prompt() -> None:
    options = ("-n", "10", "--seed", "1")
    expected = call("--prompt", "Once upon\na", *options)
    for text in ("Once upon\na\n", "\ufeffOnce upon\r\na\r\n"):
        assert call("--prompt", "-", *options, text=text.encode()) == expected
        assert call("--prompt", text.strip(), *options) == expected
    assert "stdin, line 1" in refuse("generate", "--prompt", "-", text=b"\xff\xfe\xff")[0]
    assert "the prompt is empty" in refuse("generate", "--prompt", "-", text="")[0]


def test_many_prompts_become_json_lines() -> None:
    Path("prompts.txt").write_bytes("\ufeffOnce upon a time\n\nThe fox\r\n".encode())
    lines = '{"prompt": "Once upon a time"}\n{"prompt": "The fox", "id": 7}\n'
    Path("prompts.jsonl").write_text(lines, encoding="utf-8")
    options = ("-n", "12", "--seed", "2", "--num-return-sequences", "2")
    printed = call("--prompts", "prompts.txt", *options)
    records = [json.loads(line) for line in printed.splitlines()]
    assert [record["prompt"] for record in records] == ["Once upon a time"] * 2 + ["The fox"] * 2
    assert all(record["num_tokens"] <= 12 and record["seed"] == 2 for record in records)
    assert len({record["text"] for record in records}) == 4
    assert call("--prompts", "prompts.jsonl", *options, "--batch-size", "1") == printed
    alone = call("--prompt", "Once upon a time", *options[:4])
    assert alone == f"{records[0]['prompt']}{records[0]['text']}\n"


def test_json_and_several_texts() -> None:
    first, second = read_json("generate", "--prompt", "The", "--num-beams", "3", "--num-return-sequences", "2")
    assert first["score"] >= second["score"]
    assert "seed" not in first
    options = ("--prompt", "The", "-n", "5", "--seed", "3")
    (record,) = json.loads(call(*options, "--json", "--logprobs", "2"))
    assert call(*options) == f"The{record['text']}\n"
    for token in record["tokens"]:
        assert len(token["alternatives"]) == 2
        assert token["logprob"] <= token["alternatives"][0]["logprob"] + 1e-9
    several = json.loads(call(*options, "--json", "--num-return-sequences", "2"))
    assert call(*options, "--num-return-sequences", "2").split("\n---\n\n") == [
        f"The{several[0]['text']}\n",
        f"The{several[1]['text']}\n",
    ]


THE = ("--prompt", "The", "-n", "10", "--seed", "3")


def test_a_seed_gives_a_text_again() -> None:
    first = call(*THE)
    assert first.startswith("The")
    assert first == call(*THE) == call(*THE, "--color")
    assert first != call(*THE[:-1], "4")
    assert call(*THE[:-2], "--greedy") == call(*THE, "--temperature", "0") == call(*THE[:-1], "4", "--temperature", "0")


def test_logprobs_are_a_line_a_token() -> None:
    lines = call(*THE, "--logprobs", "2", "--stop", "zzzz").splitlines()
    assert len(lines) <= 10
    for line in lines:
        assert re.fullmatch(r"\S+ +-?\d+\.\d{3} +\d+\.\d%(  \S+ \d+\.\d%){2}", line), line


def test_the_check_says_what_it_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from lumiere.generation.kv_cache import CacheCheck
    from lumiere.generation.text import TextGenerator

    options = ("--prompt", "The", "-n", "30", "--seed", "3", "--check")
    assert re.search(r"passed: \d+ cached steps", notes(*options))
    monkeypatch.setattr(TextGenerator, "check", lambda self, generation: CacheCheck(9, 0.5, 1e-4))
    assert "FAILED: 9 cached steps" in notes(*options, code=3)


def test_settings_are_read_like_options() -> None:
    settings = Settings(Sampling(), Limits(), None)
    for name, text, value in [
        ("temperature", "0.5", 0.5),
        ("top-k", "4", 4),
        ("top_k", "none", None),
        ("max_new_tokens", "9", 9),
        ("seed", "0", 0),
        ("stop", "a\\nö", ("a\nö",)),
        ("stop", "none", ()),
    ]:
        settings = settings.changed(name, text)
        assert settings.values[name.replace("-", "_")] == value
    for name, text, message in [
        ("top_l", "1", "no setting 'top_l'"),
        ("top_k", "many", "top_k must be a number, not 'many'"),
        ("top_k", "0", "top-k must be at least 1"),
        ("max_new_tokens", "none", "max_new_tokens must be a number"),
    ]:
        with pytest.raises(LumiereError, match=message) as caught:
            settings.changed(name, text)
        assert caught.value.hint


def test_a_session_keeps_its_texts_and_settings() -> None:
    script = "/set temperature 0\n/set max_new_tokens 4\nThe\n\n/history\n/settings\n/help\n/quit\nnever\n"
    printed = call("--interactive", text=script)
    first = call("--prompt", "The", "-n", "4", "--greedy").removesuffix("\n")
    assert first in printed
    [history] = re.findall(r"^(?:> )?1\. (The.*)", printed, re.MULTILINE)
    # The empty line went on from the first text.
    assert history.startswith(first)
    assert len(history) > len(first)
    assert "temperature           0.0" in printed
    assert all(command in printed for command in SESSION_COMMANDS)
    assert "never" not in printed
    said = notes("--interactive", text="/sett 1\n/set a 1\n/set top_k\n\n")
    for text in ("did you mean /set?", "there is no setting", "/set needs a name and a value"):
        assert text in said
    assert "the prompt is empty" not in said


@pytest.mark.slow
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


def test_ctrl_c_stops_the_text_and_not_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes after a first piece; what was written stays, and the session answers."""
    from lumiere.generation.decoding import Piece
    from lumiere.generation.text import TextGenerator

    def interrupted(*arguments: object) -> Iterator[Piece]:
        yield Piece(0, " upon", None)
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "stream", interrupted)
    script = "Once\n/history\n/settings\n/quit\n"
    printed = call("--interactive", text=script)
    assert "1. Once upon\n" in printed
    assert "temperature           0.8" in printed
    assert " stopped" in notes("--interactive", text=script)
