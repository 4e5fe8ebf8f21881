"""What an export for `transformers` computes there; and our modeling file against numpy."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lumiere.config.loader import validate
from lumiere.config.schema import ModelConfig, RunConfig
from lumiere.errors import FailedCheckError
from lumiere.export.exporting import TARGETS, export_model
from lumiere.export.hugging_face import own_keys
from lumiere.export.modeling_lumiere import LumiereConfig, LumiereForCausalLM
from lumiere.export.original import Original
from lumiere.export.stock_classes import WITHOUT_EFFECT
from lumiere.generation.decoding import Limits
from lumiere.generation.sampling import Sampling
from lumiere.generation.text import TextGenerator
from lumiere.importing.huggingface import open_model
from lumiere.models.transformer import Transformer
from lumiere.persistence.runs import RunStore
from lumiere.training.run import start
from lumiere.training.setup import set_up
from tests import reference
from tests.export.conftest import make_model, make_original
from tests.export.test_stock_classes import GPT2, LLAMA_LIKE
from tests.models.build import VARIANTS

TARGET = TARGETS["hf"]
FILES = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
FILES += ["tokenizer_config.json"]
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def own_class(model: Transformer) -> LumiereForCausalLM:
    theirs = LumiereForCausalLM(LumiereConfig(vocab_size=model.vocab_size, **own_keys(model))).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_our_modeling_file_computes_what_numpy_computes(variant: dict[str, Any]) -> None:
    model = make_model(**({"d_key": 8, "num_heads": 3} | variant)).double()
    theirs = own_class(model).double()
    output = theirs(torch.tensor([TOKENS]), output_attentions=True, output_hidden_states=True)
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    logits, patterns, residuals = reference.transformer(weights, TOKENS, model.settings)
    np.testing.assert_allclose(output.logits[0].numpy(), logits, atol=1e-10)
    np.testing.assert_allclose(torch.stack(output.attentions)[:, 0].numpy(), patterns, atol=1e-10)
    np.testing.assert_allclose(torch.stack(output.hidden_states)[:, 0].numpy(), residuals, atol=1e-10)
    fused = theirs(torch.tensor([TOKENS])).logits
    torch.testing.assert_close(fused, output.logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", ["card", "windows, rotary"])
@torch.no_grad()
def test_padding_on_the_left_and_the_cache_change_nothing(variant: str) -> None:
    theirs = own_class(make_model(**VARIANTS[variant])).double()
    tokens_BT = torch.tensor([TOKENS])
    expected = theirs(tokens_BT).logits
    padded = theirs(torch.tensor([[2, 2, *TOKENS]]), attention_mask=torch.tensor([[0, 0, *[1] * len(TOKENS)]])).logits
    torch.testing.assert_close(padded[:, 2:], expected, rtol=0, atol=1e-10)
    cache: Any = transformers.DynamicCache()
    parts = [theirs(tokens_BT[:, begin : begin + 3], cache=cache).logits for begin in range(0, 9, 3)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-10)


def test_our_modeling_file_has_every_setting() -> None:
    settings = ModelConfig.model_fields.keys() - WITHOUT_EFFECT
    assert signature(LumiereConfig.__init__).parameters.keys() - {"self", "kwargs"} == settings | {"vocab_size"}


CASES: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "gpt2": GPT2,
    "llama": LLAMA_LIKE,
    "llama, biases": LLAMA_LIKE | {"bias": "qkv"},
    "llama 3": LLAMA_LIKE | VARIANTS["slow rotations"],
    "mistral": LLAMA_LIKE | {"attention_windows": [3, 3]},
    "qwen3": LLAMA_LIKE | {"query_key_norm": True},
    "gpt neox, wide": GPT2 | VARIANTS["gpt neox"],
    "gpt neo": GPT2 | {"attention_scale": 1.0, "attention_windows": [3, None]},
}
FAST = ("llama", "card")


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] if name not in FAST else []) for name in CASES]
)
def test_a_folder_agrees_with_transformers(variant: str) -> None:
    original = make_original(**({"d_key": 8} | CASES[variant]))
    exported = export_model(TARGET, Path("out"), original)
    assert sorted(os.listdir("out")) == list(exported.files)
    assert set(exported.files) - set(FILES) <= {"modeling_lumiere.py"}
    assert [receipt.error for receipt in exported.receipts[:3]] == [0, 0, 0]
    assert all(receipt.error < 1e-5 for receipt in exported.receipts)
    values = json.loads(Path("out/config.json").read_text())
    if "LlamaForCausalLM" in values["architectures"]:
        assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == original.model.settings.rotary_base
    ours, found = original.model.state_dict(), open_model("out").state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in ours.items())


def test_a_folder_that_computes_something_else_is_not_written() -> None:
    def corrupt(folder: Path, original: Original) -> None:
        TARGET.write(folder, original)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 5e3, "rope_parameters": None}))

    with pytest.raises(FailedCheckError, match=r"the same logits .* nothing written"):
        export_model(replace(TARGET, write=corrupt), Path("out"), make_original(**LLAMA_LIKE))
    assert os.listdir() == []


@pytest.mark.slow
@pytest.mark.parametrize("model", [{"positions": "rotary"}, GPT2 | {"d_key": 8, "embedding_size": 16}, {}])
def test_the_program_in_the_readme_writes_our_greedy_text(model: dict[str, Any], tiny_config: RunConfig) -> None:
    """Run as it stands there. It trusts the modeling file, which is ours."""
    values = tiny_config.model_dump()
    config = validate(values | {"model": values["model"] | model | {"context_size": 64}})
    run = start(set_up(config), RunStore("runs"), command=["lumiere", "train"]).run
    original = Original(run.load_model("best"), run.load_tokenizer(), {"run": run.name})
    export_model(TARGET, Path("out"), original)
    program = Path("out/README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", program.replace("path/to/this/folder", "out")],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    generation = TextGenerator(original.model, original.tokenizer).write(
        "Once upon a time", Sampling(temperature=0), Limits(40)
    )
    assert done.stdout.rstrip("\n") == f"Once upon a time{generation.text}".rstrip("\n")
