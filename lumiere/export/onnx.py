"""ONNX files, checked with onnxruntime.

torch traces the model with a batch and a length that may vary. While it does, `lumiere.device.prefers_hand_written` is
false, so that the trace holds torch's operations and none of our kernels.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lumiere.errors import FailedCheckError, shortened
from lumiere.export.hugging_face import tokenizer_values
from lumiere.export.original import FLOAT32_TOLERANCE, Original, render
from lumiere.files import DISK
from lumiere.interpret.result import Receipt, relative_error
from lumiere.models.transformer import Transformer

PACKAGES = ("onnx>=1.19", "onnxscript>=0.5.4", "onnxruntime>=1.23")
FILE = "model.onnx"
TRACED = (2, 5)
"""Batch and length of the tokens that are traced, where the context is that long."""


class Logits(nn.Module):
    """The model as a function of token ids alone."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.logits(input_ids)


@torch.inference_mode(False)
def write(folder: Path, original: Original) -> None:
    """Write the model as a function `input_ids` (batch, length) -> `logits` (batch, length, vocabulary)."""
    model = original.model
    tokens_BT = torch.zeros(TRACED[0], min(TRACED[1], model.context_size), dtype=torch.long)
    dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=1, max=model.context_size)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecations inside of torch
        program = torch.onnx.export(
            Logits(model),
            (tokens_BT,),
            dynamo=True,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": dimensions},
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    program.model.metadata_props.update({name: str(value) for name, value in original.origin.items()})
    program.save(folder / FILE)
    DISK.sync(folder / FILE)
    tokenizer = json.dumps(tokenizer_values(original.tokenizer), indent=2, ensure_ascii=False)
    DISK.write(folder / "tokenizer.json", tokenizer.encode())
    readme = render("onnx/README.md", origin=original.origin, context_size=model.context_size)
    DISK.write(folder / "README.md", readme)


@torch.inference_mode()
def check(folder: Path, original: Original) -> Iterator[Receipt | str]:
    """Compare logits at other shapes than the traced one: the longest, several rows, and a single token."""
    onnxruntime: Any = import_module("onnxruntime")

    try:
        session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever the library raises
        raise FailedCheckError(
            f"onnxruntime cannot run the model: {shortened(str(error))}; nothing was written",
            "Lumiere is tested with onnxruntime 1.32",
        ) from error
    tokens_BT, length = original.sample, original.sample.shape[1]
    shapes = (tokens_BT, tokens_BT[:, : length // 3 * 3].reshape(3, -1) if length >= 3 else tokens_BT, tokens_BT[:, :1])
    name = f"onnxruntime {onnxruntime.__version__}"
    for tokens_BT in shapes:
        (logits,) = session.run(["logits"], {"input_ids": tokens_BT.numpy()})
        error = relative_error(torch.from_numpy(logits), original.model.logits(tokens_BT))
        yield Receipt(f"the same logits in {name}, shape {tuple(tokens_BT.shape)}", error, FLOAT32_TOLERANCE)
