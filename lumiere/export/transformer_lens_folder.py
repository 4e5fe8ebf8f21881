"""The folder that TransformerLens boots a model from: weights, config, expected logits, and how to load them."""

import json
import subprocess
import sys
from collections.abc import Mapping
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lumiere.errors import FailedCheckError, shortened
from lumiere.export.expected import logits_of, logits_receipt
from lumiere.export.transformer_lens import bridge_config, bridge_logits, bridge_weights
from lumiere.interpret.result import FLOAT64_TOLERANCE, Receipt
from lumiere.models.transformer import Transformer
from lumiere.programs import install_command

FLOAT32_TOLERANCE = 1e-4
"""Of logits that two libraries compute in float32, relative to the largest."""
FIRST_VERSION = 4
"""Of TransformerLens: older ones have no `boot_native`."""

LOADER = '''\
"""Boots this model in TransformerLens 4.3 or newer. `python load.py` compares its logits with the expected ones."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

FOLDER = Path(__file__).resolve().parent


def load_model(dtype: torch.dtype = torch.float32) -> TransformerBridge:
    config = TransformerBridgeConfig(**json.loads((FOLDER / "config.json").read_text(encoding="utf-8")))
    model = TransformerBridge.boot_native(config, dtype=dtype)
    model.load_state_dict(load_file(FOLDER / "model.safetensors"))
    return model.eval()


def encode(text: str) -> torch.Tensor:
    """The start token and the ids of `text`, (1, T)."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # text that spells a special token is text
    start = tokenizer.token_to_id("<|sot|>")
    return torch.tensor([[start, *tokenizer.encode(text, add_special_tokens=False).ids]])


def difference() -> float:
    """The largest difference from the expected logits, relative to the largest of them."""
    expected = load_file(FOLDER / "expected.safetensors")
    with torch.inference_mode():
        logits = load_model()(expected["tokens"])
    return ((logits - expected["logits"]).abs().max() / max(1.0, expected["logits"].abs().max())).item()


if __name__ == "__main__":
    off = difference()
    print(f"largest difference of the logits: {off:.0e} (allowed TOLERANCE)")
    raise SystemExit(not off <= TOLERANCE)
'''.replace("TOLERANCE", f"{FLOAT32_TOLERANCE:.0e}")

README = """\
# A model of Lumiere for TransformerLens

{origin}

| file | what it holds |
|---|---|
| `model.safetensors` | the weights, by the names of `TransformerBridge.state_dict()` |
| `config.json` | the arguments of `TransformerBridgeConfig` |
| `tokenizer.json` | the tokenizer, as Hugging Face `tokenizers` reads it |
| `expected.safetensors` | `tokens` (1, {length}) and the `logits` (1, {length}, {vocab_size}) that Lumiere computes |
| `load.py` | boots the model, and checks it |

```
pip install 'transformer-lens>=4.3,<5'
python load.py                                # compares the logits
```

```python
from load import encode, load_model           # in this folder
model = load_model()
logits, cache = model.run_with_cache(encode("Once upon a time"))
```

The token ids of the expected logits: {tokens}.
"""


def folder_files(
    model: Transformer, tokenizer_json: bytes, tokens_BT: Tensor, origin: Mapping[str, Any]
) -> dict[str, bytes]:
    """The contents of the folder, by file name.

    Args:
        model: in evaluation mode, on the CPU.
        tokenizer_json: as `tokenizers` writes it.
        tokens_BT: on which the expected logits are computed, one sequence.
        origin: where the model comes from; names and values are written to the README as they are.

    Raises:
        LumiereError: TransformerLens has no such model.
    """
    config = bridge_config(model)
    expected = {"tokens": tokens_BT, "logits": logits_of(model, tokens_BT).contiguous()}
    readme = README.format(
        origin="\n".join(f"- {name}: `{value}`" for name, value in origin.items()),
        length=tokens_BT.shape[1],
        vocab_size=model.vocab_size,
        tokens=" ".join(map(str, tokens_BT[0].tolist())),
    )
    return {
        "model.safetensors": safetensors.torch.save(bridge_weights(model), {"format": "pt"}),
        "config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "tokenizer.json": tokenizer_json,
        "expected.safetensors": safetensors.torch.save(expected),
        "load.py": LOADER.encode(),
        "README.md": readme.encode(),
    }


def check_folder_by_equations(folder: Path, model: Transformer) -> Receipt:
    """What the folder's config and weights compute in float64, by TransformerLens's equations, beside the model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    tokens_BT = safetensors.torch.load_file(folder / "expected.safetensors")["tokens"]
    expected_BTVocab = logits_of(deepcopy(model).double(), tokens_BT)
    law = "the folder's weights give the model's logits (float64)"
    return logits_receipt(law, bridge_logits(config, weights, tokens_BT), expected_BTVocab, FLOAT64_TOLERANCE)


def check_folder_by_loading(folder: Path) -> Receipt | None:
    """What `load.py` says, in a process of its own; None where TransformerLens is missing or too old.

    Raises:
        FailedCheckError: it does not get that far.
    """
    version = installed_version()
    if version is None or int(version.partition(".")[0]) < FIRST_VERSION:
        return None
    # -B: what stands in the folder is what was written there, and no bytecode.
    command = [sys.executable, "-B", "-c", "import load; print(load.difference())"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise FailedCheckError(
            f"TransformerLens {version} cannot boot the model: {shortened(reason.strip())}; nothing was written",
            f"Lumiere is tested with 4.3: {install_command('transformer-lens>=4.3,<5')}",
        )
    error = float(done.stdout.split()[-1])  # what TransformerLens itself prints comes before
    return Receipt(f"the same logits in TransformerLens {version} (float32)", error, FLOAT32_TOLERANCE)


def installed_version() -> str | None:
    """Of TransformerLens, which is not imported for this; None where it is missing."""
    try:
        return metadata.version("transformer-lens")
    except metadata.PackageNotFoundError:
        return None
