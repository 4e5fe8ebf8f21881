"""stdout and stderr that cannot take everything: other encodings, readers that are gone, full and closed devices."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lumiere.cli import main
from lumiere.cli.streams import CLOSED_PIPE, Stderr
from lumiere.persistence.runs import Run, RunStore

TEXT = "Café … 漢, once upon"


class Bytes(io.BytesIO):
    """What was written, also after the text wrapper around it is gone."""

    def close(self) -> None:
        pass


def run_main(arguments: list[str], stdout: object, stderr: object) -> int:
    """The exit code of a command whose standard streams are these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lumiere", *arguments])
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        with pytest.raises(SystemExit) as ending:
            main()
        sys.stdout.close()
        sys.stderr.close()
    code = ending.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def run(trained_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of the trained run, beside a text, since `eval` keeps what it has found with the run."""
    copy = tmp_path / "trained" / trained_run.name
    shutil.copytree(trained_run.path, copy)
    monkeypatch.setenv("LUMIERE_RUNS_DIR", str(copy.parent))
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    return Run(copy)


COMMANDS = [
    "--help",
    "train --help",
    "inspect lens --help",
    "inspect",
    "eval RUN --text text.txt",
    "eval RUN --text text.txt --json",
    "generate -n 20 --run RUN",
    "generate -n 20 --json --run RUN",
    "generate -n 5 --logprobs 2 --run RUN",
    "generate -n 5 --prompts text.txt --run RUN",
    "inspect attention --file text.txt --run RUN",
    "inspect ablate --file text.txt --run RUN",
    "inspect lens --file text.txt --run RUN --json",
    "inspect tokens --file text.txt --run RUN",
    "inspect dynamics --run RUN",
    "inspect summary --run RUN",
    "runs ls",
    "runs ls --json",
    "runs show RUN",
    "runs plot RUN",
    "runs watch RUN --json",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_to_any_encoding(command: str, run: Run) -> None:
    # Code page 1252 has some of the characters that ASCII lacks, such as ± and ·.
    for encoding in ("ascii", "cp1252") if command.split()[0] in ("eval", "generate", "runs") else ("ascii",):
        stdout, stderr = Bytes(), Bytes()
        streams = (io.TextIOWrapper(stream, encoding, errors="strict") for stream in (stdout, stderr))
        assert run_main(command.replace("RUN", run.id).split(), *streams) == 0
        printed = stdout.getvalue().decode(encoding)
        assert printed
        if "--json" in command and "watch" not in command:
            json.loads(printed)
        if "--prompts" in command:
            assert json.loads(printed)["prompt"] == TEXT, "JSON escapes what the encoding lacks, so nothing is lost"
        if command == "runs ls":
            assert re.search(r" 12 +\d\.\d+ +\d+ min", printed), "no curve"


def test_characters_that_ascii_lacks_get_lookalikes(monkeypatch: pytest.MonkeyPatch) -> None:
    from lumiere.cli.streams import open_streams

    printed = Bytes()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(Bytes(), "ascii"))
    open_streams()
    sys.stdout.write("▁▄█ 1.5 ± 0.2 … 漢é")
    sys.stdout.flush()
    assert printed.getvalue() == b"_~# 1.5 +- 0.2 ... ??"


def test_print_config_to_ascii_is_the_same_config() -> None:
    from lumiere.config.loader import load_config

    printed = Bytes()
    arguments = ["train", "tiny", "--print-config", "--set", "dataset.subset=naïve-漢"]
    streams = (io.TextIOWrapper(printed, "ascii"), io.TextIOWrapper(Bytes(), "ascii"))
    assert run_main(arguments, *streams) == 0
    Path("printed.yaml").write_bytes(printed.getvalue())
    assert load_config("printed.yaml").dataset.subset == "naïve-漢"


def closed_pipe() -> io.TextIOWrapper:
    """What is written to a pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return io.TextIOWrapper(open(writer, "wb", buffering=0), "utf-8")  # pyright: ignore


def full_device() -> io.TextIOWrapper:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    return io.TextIOWrapper(open("/dev/full", "wb", buffering=0), "utf-8")  # pyright: ignore


@pytest.mark.parametrize("command", ["--help", "--version", "runs ls", "runs ls --json", "generate -n 5"])
@pytest.mark.usefixtures("run")
def test_a_closed_pipe_ends_a_command_as_sigpipe_would(command: str) -> None:
    stderr = Bytes()
    code = run_main(command.split(), closed_pipe(), io.TextIOWrapper(stderr, "utf-8"))
    assert code == CLOSED_PIPE == 128 + 13
    assert stderr.getvalue() == b""


@pytest.mark.parametrize("command", ["--help", "runs ls", "runs ls --json", "eval latest"])
@pytest.mark.usefixtures("run")
def test_a_full_device_is_reported_in_two_lines(command: str) -> None:
    stderr = Bytes()
    assert run_main(command.split(), full_device(), io.TextIOWrapper(stderr, "utf-8")) == 2
    error, hint = stderr.getvalue().decode().splitlines()[-2:]
    assert error.startswith("error: ")
    assert os.strerror(errno.ENOSPC) in error
    assert hint.startswith("hint: ")


@pytest.mark.parametrize(
    ("stdout", "stderr", "code"),
    [
        (lambda: None, lambda: None, 0),
        (closed_pipe, closed_pipe, CLOSED_PIPE),
        (full_device, full_device, 2),
        (lambda: io.TextIOWrapper(Bytes(), "utf-8"), closed_pipe, 0),
        (lambda: io.TextIOWrapper(Bytes(), "utf-8"), full_device, 0),
    ],
)
def test_no_training_is_lost_with_its_output(stdout: object, stderr: object, code: int, trained_run: Run) -> None:
    arguments = ["train", str(trained_run.config_path), "--max-steps", "2"]
    assert run_main(arguments, stdout(), stderr()) == code  # pyright: ignore
    assert RunStore("runs").open("latest").record.status == "finished"


def test_a_stderr_that_recovers_gets_what_comes_then() -> None:
    class Flaky(Bytes):
        is_full = True

        def write(self, data: object) -> int:
            if self.is_full:
                raise OSError(errno.ENOSPC, "full")
            return super().write(data)  # pyright: ignore

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
