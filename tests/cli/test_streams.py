"""stdout and stderr that cannot take everything: other encodings, readers that are gone, full and closed devices."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lumiere.cli import main
from lumiere.cli.streams import CLOSED_PIPE, Stderr, open_streams
from lumiere.config.loader import load_config
from lumiere.persistence.runs import Run, RunStore

TEXT = "Café … 漢, once upon"
Stream = io.TextIOWrapper | None


class Bytes(io.BytesIO):
    """What was written, also after the text wrapper around it is gone."""

    def close(self) -> None:
        pass


def run_main(command: str, stdout: Stream, stderr: Stream) -> int:
    """The exit code of a command with these standard streams."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lumiere", *command.split()])
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        with pytest.raises(SystemExit) as ending:
            main()
        sys.stdout.close()
        sys.stderr.close()
    assert isinstance(ending.value.code, int)
    return ending.value.code


def printed_to(encoding: str, command: str) -> str:
    """The stdout of a command on streams that refuse what their encoding lacks."""
    stdout, stderr = Bytes(), Bytes()
    assert run_main(command, *(io.TextIOWrapper(stream, encoding, errors="strict") for stream in (stdout, stderr))) == 0
    return stdout.getvalue().decode(encoding)


COMMANDS = """
    train --help | inspect | eval RUN --text text.txt | eval RUN --text text.txt --json
    | generate -n 20 | generate -n 5 --logprobs 2 | generate -n 5 --prompts text.txt
    | inspect attention --file text.txt | inspect ablate --file text.txt | inspect lens --file text.txt --json
    | inspect tokens --file text.txt | inspect dynamics | inspect summary
    | runs ls | runs show RUN | runs plot RUN | runs watch RUN --json
"""


@pytest.mark.parametrize("command", [command.strip() for command in COMMANDS.split("|")])
def test_every_command_prints_to_any_encoding(command: str, run: Run) -> None:
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    # Code page 1252 has some of the characters that ASCII lacks, such as ± and ·.
    for encoding in ("ascii", "cp1252") if command.split()[0] in ("eval", "generate", "runs") else ("ascii",):
        printed = printed_to(encoding, command.replace("RUN", run.id))
        assert printed
        if "--json" in command and "watch" not in command:
            json.loads(printed)
        if "--prompts" in command:
            assert json.loads(printed)["prompt"] == TEXT, "JSON escapes what the encoding lacks, so nothing is lost"
        if command == "runs ls":
            assert re.search(r" 12 +\d\.\d+ +\d+ min", printed), "no curve"


def test_characters_that_ascii_lacks_are_replaced_or_escaped() -> None:
    stdout = Bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(stdout, "ascii"))
        patch.setattr(sys, "stderr", io.TextIOWrapper(Bytes(), "ascii"))
        open_streams()
        sys.stdout.write("▁▄█ 1.5 ± 0.2 … 漢é")
        sys.stdout.flush()
    assert stdout.getvalue() == b"_~# 1.5 +- 0.2 ... ??"
    Path("printed.yaml").write_text(printed_to("ascii", "train tiny --print-config --set dataset.subset=naïve-漢"))
    assert load_config("printed.yaml").dataset.subset == "naïve-漢"


def closed_pipe() -> io.TextIOWrapper:
    """A stream to a pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return io.TextIOWrapper(open(writer, "wb", buffering=0), "utf-8")  # pyright: ignore[reportArgumentType]


def full_device() -> io.TextIOWrapper:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    return io.TextIOWrapper(open("/dev/full", "wb", buffering=0), "utf-8")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("command", ["--help", "runs ls", "runs ls --json", "generate -n 5", "eval latest"])
@pytest.mark.usefixtures("run")
def test_a_closed_pipe_ends_a_command_as_sigpipe_would_and_a_full_device_is_an_error(command: str) -> None:
    stderr = Bytes()
    assert run_main(command, closed_pipe(), io.TextIOWrapper(stderr, "utf-8")) == CLOSED_PIPE == 128 + 13
    assert "eval" in command or stderr.getvalue() == b""
    assert run_main(command, full_device(), io.TextIOWrapper(stderr, "utf-8")) == 2
    error, hint = stderr.getvalue().decode().splitlines()[-2:]
    assert error.startswith("error: ")
    assert os.strerror(errno.ENOSPC) in error
    assert hint.startswith("hint: ")


def working() -> io.TextIOWrapper:
    return io.TextIOWrapper(Bytes(), "utf-8")


def absent() -> None:
    return None


@pytest.mark.parametrize(
    ("stdout", "stderr", "code"),
    [
        (absent, absent, 0),
        (closed_pipe, closed_pipe, CLOSED_PIPE),
        (full_device, full_device, 2),
        (working, closed_pipe, 0),
        (working, full_device, 0),
    ],
)
def test_no_training_is_lost_with_its_output(
    stdout: Callable[[], Stream], stderr: Callable[[], Stream], code: int, trained_run: Run
) -> None:
    assert run_main(f"train {trained_run.config_path} --max-steps 2", stdout(), stderr()) == code
    assert RunStore("runs").open("latest").record.status == "finished"


def test_a_stderr_that_recovers_gets_what_comes_then() -> None:
    class Flaky(Bytes):
        is_full = True

        def write(self, data: "bytes | bytearray | memoryview") -> int:  # pyright: ignore
            if self.is_full:
                raise OSError(errno.ENOSPC, "full")
            return super().write(data)

    device = Flaky()
    stderr = Stderr(device, "utf-8", write_through=True)
    stderr.write("lost")
    device.is_full = False
    stderr.write(" and found")
    assert device.getvalue().endswith(b" and found")


@pytest.mark.skipif(os.name != "posix", reason="descriptors are closed by a shell")
def test_no_file_takes_the_number_of_a_closed_stream() -> None:
    """A library that prints to descriptor 1 would write into it."""
    script = (
        "import sys; from lumiere.cli.streams import open_streams; open_streams(); "
        "print('lost'); sys.exit(open('file', 'w').fileno() < 3)"
    )
    command = ["sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, script]
    assert subprocess.run(command, check=False).returncode == 0
    assert Path("file").read_text() == ""
