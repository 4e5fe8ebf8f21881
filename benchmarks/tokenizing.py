"""Tokenize a corpus larger than memory: `python benchmarks/tokenizing.py --gigabytes 2`.

Writes a corpus of built-in stories as JSON Lines, streams it through `lumiere tokenize` in a separate process, and
prints its time and peak memory, next to importing the libraries; the speed of the tokenizers' `encode_batch` alone on
documents in memory; and the time to the first training batch after start-up.

With `--one-document`, the stories are one file of plain text, which is one document. Prints the peak memory of
`lumiere tokenize` and, on its first `--eval-megabytes`, of `lumiere eval --text`.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lumiere.data.stories import story

SETTINGS = [
    "dataset.name=json",
    "dataset.streaming=true",
    "dataset.num_documents=null",
    "tokenizer.vocab_size=4096",
]
STORIES_AT_ONCE = 2000
ALONE_BYTES = 40_000_000  # documents per `encode_batch` call, as many as in Lumiere
CODE_OF_IMPORTS = "import torch, numpy, tokenizers, lumiere.cli.tokenize, lumiere.data.dataset"
CODE_OF_FIRST_BATCH = """
import sys, time
from lumiere.config.loader import load_config
from lumiere.data.batches import batch_at
from lumiere.data.dataset import tokenize_corpus
config = load_config("tiny", sys.argv[1:])
start = time.perf_counter()
corpus = tokenize_corpus(config)
windows = corpus.windows("train", config)
batch_at(12345, windows, config.training.batch_size, seed=0)
print(time.perf_counter() - start, len(windows), corpus.splits["train"].facts.num_documents)
"""


def tell(first: int) -> str:
    texts = (story("train", index) for index in range(first, first + STORIES_AT_ONCE))
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def make_corpus(path: Path, num_bytes: int) -> None:
    with open(path, "w", encoding="utf-8") as file, multiprocessing.Pool() as pool:
        firsts = range(0, num_bytes // 100, STORIES_AT_ONCE)  # a story has at least a few hundred bytes
        for text in pool.imap(tell, firsts):
            file.write(text)
            if file.tell() >= num_bytes:
                pool.terminate()
                return


def process(command: list[str], cache: Path) -> tuple[str, float, float]:
    """Run a process; return its output, seconds, and peak memory in MB."""
    environment = os.environ | {"LUMIERE_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as file:
        child = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        file.seek(0)
        output = file.read()
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return output, time.perf_counter() - start, usage.ru_maxrss * unit / 1e6


def alone(corpus: Path, cache: Path) -> float:
    """Return bytes per second of `encode_batch` on documents in memory, with the tokenizer that Lumiere trained."""
    import tokenizers

    [path] = cache.glob("corpora/*/tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(str(path))
    texts: list[str] = []
    num_bytes = 0
    with open(corpus, encoding="utf-8") as file:
        while num_bytes < ALONE_BYTES and (line := file.readline()):
            texts.append(json.loads(line)["text"])
            num_bytes += len(texts[-1].encode())
    start = time.perf_counter()
    for first in range(0, len(texts), 1024):
        backend.encode_batch(texts[first : first + 1024], add_special_tokens=False)
    return num_bytes / (time.perf_counter() - start)


def make_document(path: Path, num_bytes: int) -> None:
    """Write the same stories repeatedly: only the length matters for memory."""
    stories = "\n\n".join(story("train", index) for index in range(200)) + "\n\n"
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            file.write(stories)


def one_document(folder: Path, num_bytes: int, num_scored: int) -> None:
    document, scored, cache, runs = (folder / name for name in ("document.txt", "scored.txt", "cache", "runs"))
    make_document(document, num_bytes)
    lumiere = [sys.executable, "-m", "lumiere"]
    _, _, imports = process([sys.executable, "-c", CODE_OF_IMPORTS], cache)
    settings = ["--set", "dataset.name=text", "--set", f"dataset.data_files={document}"]
    output, seconds, peak = process([*lumiere, "tokenize", "tiny", "--json", *settings], cache)
    read = sum(split["bytes"] for split in json.loads(output)["splits"].values())
    print(f"lumiere tokenize          {read / 1e6:,.0f} MB in one document, {seconds:.0f} s")
    print(f"peak memory               {peak:,.0f} MB, {peak - imports:,.0f} MB more than the imports", flush=True)
    process([*lumiere, "train", "tiny", "--max-steps", "1", "--runs-dir", str(runs)], cache)
    command = [*lumiere, "eval", "latest", "--runs-dir", str(runs), "--json", "--no-baselines", "--text"]
    for size in (num_scored // 10, num_scored):
        make_document(scored, size)
        output, seconds, peak = process([*command, str(scored)], cache)
        read = json.loads(output)["num_bytes"]
        print(f"lumiere eval --text       {read / 1e6:,.1f} MB, {seconds:.0f} s, peak {peak:,.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--one-document", action="store_true")
    parser.add_argument("--eval-megabytes", type=float, default=5.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.one_document:
            one_document(Path(name), round(options.gigabytes * 1e9), round(options.eval_megabytes * 1e6))
            return
        corpus, cache = Path(name) / "corpus.jsonl", Path(name) / "cache"
        make_corpus(corpus, round(options.gigabytes * 1e9))
        size = corpus.stat().st_size
        print(f"corpus                    {size / 1e9:.2f} GB of JSON Lines", flush=True)
        settings = [*SETTINGS, f"dataset.data_files={corpus}"]
        flags = [part for setting in settings for part in ("--set", setting)]
        _, _, imports = process([sys.executable, "-c", CODE_OF_IMPORTS], cache)
        command = [sys.executable, "-m", "lumiere", "tokenize", "tiny", "--json", *flags]
        output, seconds, peak = process(command, cache)
        splits = json.loads(output)["splits"].values()
        num_bytes = sum(split["bytes"] for split in splits)
        ours = num_bytes / seconds
        theirs = alone(corpus, cache)
        print(f"lumiere tokenize          {seconds:.0f} s, {ours / 1e6:.2f} MB/s of text, all of it included")
        print(f"encode_batch alone        {theirs / 1e6:.2f} MB/s; Lumiere reaches {ours / theirs:.0%}")
        print(f"peak memory               {peak:,.0f} MB, {peak - imports:,.0f} MB more than the imports")
        first_batch = [sys.executable, "-c", CODE_OF_FIRST_BATCH, *settings]
        for label in ("first batch", "first batch again"):
            output, _, peak = process(first_batch, cache)
            seconds, windows, documents = output.split()
            print(
                f"{label:24}  {float(seconds):.2f} s after start-up, of {int(windows):,} windows of "
                f"{int(documents):,} documents"
            )


if __name__ == "__main__":
    main()
