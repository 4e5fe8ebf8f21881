"""Run a GGUF file in llama.cpp, in a process of its own: `python -m lumiere.export.llama_cpp` answers one request.

The package `xllamacpp` holds llama.cpp. Keys and values are kept in float32, and attention is not fused, so that its
numbers can be compared. Imports nothing of Lumiere, and no torch.
"""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

NUM_BEST = 10
PRINTABLE = "root ::= [ -~]+"
"""A grammar for the token that is generated: log-probabilities come without one that ends within a character."""


class Answer(NamedTuple):
    """What llama.cpp computes.

    Attributes:
        ids: The ids of each text.
        best: For each prompt, the most probable next ids with their log-probabilities, best first.
    """

    ids: list[list[int]]
    best: list[list[tuple[int, float]]]


def ask(path: Path, texts: Sequence[str], prompts: Sequence[Sequence[int]]) -> Answer | str:
    """Return what llama.cpp computes for a file, or why it does not.

    Args:
        texts: To be tokenized.
        prompts: Ids to be continued.
    """
    request = json.dumps({"path": str(path), "texts": texts, "prompts": prompts})
    command = [sys.executable, "-P", "-m", "lumiere.export.llama_cpp"]  # -P: no module of the current folder
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    answer = json.loads(done.stdout.splitlines()[-1])
    return Answer(answer["ids"], [[(id_, value) for id_, value in best] for best in answer["best"]])


def main() -> None:
    xllamacpp: Any = import_module("xllamacpp")
    request = json.load(sys.stdin)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = request["path"]
    parameters.n_ctx = max(map(len, request["prompts"])) + 1
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = 1
    parameters.warmup = False
    parameters.verbosity = -1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(path: str, **values: Any) -> Any:
        data, headers = json.dumps(values).encode(), {"Content-Type": "application/json"}
        with opener.open(urllib.request.Request(server.listening_address + path, data, headers)) as reply:
            return json.load(reply)

    options = {"n_predict": 1, "n_probs": NUM_BEST, "temperature": 0, "cache_prompt": False, "grammar": PRINTABLE}
    answers = [post("/completion", prompt=prompt, **options) for prompt in request["prompts"]]
    best = [answer["completion_probabilities"][0]["top_logprobs"] for answer in answers]
    replies = [post("/tokenize", content=text, add_special=True, parse_special=False) for text in request["texts"]]
    answer = {
        "ids": [reply["tokens"] for reply in replies],
        "best": [[(token["id"], token["logprob"]) for token in tokens] for tokens in best],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
