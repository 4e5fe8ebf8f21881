"""Folders for `transformers`: a stock model where one of its classes computes it, else one with our modeling file.

`modeling_lumiere.py` beside this file is that file. The check runs it from here, and never what a folder holds.
"""

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from lumiere.data.tokenizer import EOT, PAD, SOT, SPECIAL_TOKENS, Tokenizer
from lumiere.errors import FailedCheckError, shortened
from lumiere.export.original import FLOAT32_TOLERANCE, TEXTS, Original, render
from lumiere.export.stock_classes import WITHOUT_EFFECT, Keys, find_stock, stock_weights
from lumiere.files import DISK
from lumiere.generation.decoding import suppressed_ids
from lumiere.importing.huggingface import open_model
from lumiere.interpret.result import Receipt, relative_error
from lumiere.models.transformer import Transformer

PACKAGES = ("transformers>=5.0",)
MODELING_FILE = "modeling_lumiere.py"
OWN_CLASS = "LumiereForCausalLM"
OTHER_TOKENIZERS = ("qwen2",)
"""Types for which `AutoTokenizer` of transformers 5 takes a tokenizer of its own, whatever the folder says."""
PROMPT = "Once upon a time"
NUM_GREEDY_TOKENS = 32


def write(folder: Path, original: Original) -> None:
    """Write weights, config, tokenizer, generation config and README."""
    model, tokenizer = original.model, original.tokenizer
    if stock := find_stock(model, OTHER_TOKENIZERS):
        kind = {"architectures": [stock.class_name], "model_type": stock.model_type}
        keys, weights = stock.keys, stock_weights(model, stock)
    else:
        kind = {"architectures": [OWN_CLASS], "model_type": "lumiere"}
        keys, weights = own_keys(model), model.state_dict()
        DISK.write(folder / MODELING_FILE, resources.files("lumiere.export").joinpath(MODELING_FILE).read_bytes())
    ids = {"bos_token_id": SOT, "eos_token_id": EOT, "pad_token_id": PAD}
    suppressed = {"suppress_tokens": suppressed_ids(model.vocab_size, tokenizer)}
    DISK.write_tensors(folder / "model.safetensors", weights, {"format": "pt"})
    for name, values in {
        "config.json": kind | {"vocab_size": model.vocab_size, "dtype": "float32"} | ids | keys,
        "generation_config.json": ids | suppressed,
        "tokenizer.json": tokenizer_values(tokenizer),
        "tokenizer_config.json": tokenizer_config(model.context_size),
    }.items():
        DISK.write(folder / name, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
    DISK.write(folder / "README.md", readme(original, kind["architectures"][0]))


def own_keys(model: Transformer) -> Keys:
    """Return the keys of a `config.json` for our modeling file."""
    module = MODELING_FILE.removesuffix(".py")
    auto_map = {"AutoConfig": f"{module}.LumiereConfig", "AutoModelForCausalLM": f"{module}.{OWN_CLASS}"}
    settings = model.settings.model_dump(exclude=WITHOUT_EFFECT)
    return {"auto_map": auto_map} | settings | {"num_key_value_heads": model.settings.key_value_heads}


def tokenizer_values(tokenizer: Tokenizer) -> Keys:
    """Return the tokenizer, which begins each text with the start token there."""
    start = {"SpecialToken": {"id": SPECIAL_TOKENS[SOT], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    post_processor = {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": {
            SPECIAL_TOKENS[SOT]: {"id": SPECIAL_TOKENS[SOT], "ids": [SOT], "tokens": [SPECIAL_TOKENS[SOT]]}
        },
    }
    return json.loads(tokenizer.to_json()) | {"post_processor": post_processor}


def tokenizer_config(context_size: int) -> Keys:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[SOT],
        "eos_token": SPECIAL_TOKENS[EOT],
        "pad_token": SPECIAL_TOKENS[PAD],
        "model_max_length": context_size,
        "model_input_names": ["input_ids", "attention_mask"],
        "split_special_tokens": True,  # text that spells a special token is text
        "clean_up_tokenization_spaces": False,
    }


def readme(original: Original, class_name: str) -> bytes:
    card = original.card
    if card is not None:
        card = card.replace("library_name: lumiere\n", "library_name: transformers\n", 1)
    own = class_name == OWN_CLASS
    return render("hugging_face/README.md", card=card, origin=original.origin, class_name=class_name, is_own=own)


def check(folder: Path, original: Original) -> Iterator[Receipt]:
    """Read the folder back, and run it in `transformers`."""
    found, weights = open_model(folder).state_dict(), original.model.state_dict()
    difference = max(float((found[name] - weight).abs().max()) for name, weight in weights.items() if name in found)
    yield Receipt("the folder read back gives the same weights", difference, 0.0)
    yield from check_in_transformers(folder, original)


@torch.inference_mode()
def check_in_transformers(folder: Path, original: Original) -> Iterator[Receipt]:
    """Compare tokens, logits and greedy text."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name, model = f"transformers {transformers.__version__}", original.model
    class_name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    try:
        module: Any = transformers
        if class_name == OWN_CLASS:
            from lumiere.export import modeling_lumiere as module
        theirs, report = getattr(module, class_name).from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the library raises
        raise FailedCheckError(
            f"{name} cannot load the model: {shortened(f'{type(error).__name__}: {error}')}; nothing was written",
            "Lumiere is tested with transformers 4.57 and 5",
        ) from error
    problems = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]
    yield Receipt(f"{name} finds all tensors, and no others", float(len(problems)), 0.0)
    differing = [text for text in TEXTS if tokenizer(text)["input_ids"] != original.tokenizer.encode(text, start=True)]
    yield Receipt("texts have the same token ids there", float(len(differing)), 0.0)
    expected_BTVocab = model.logits(original.sample)
    error = relative_error(theirs(original.sample).logits, expected_BTVocab)
    yield Receipt(f"the same logits in {name} (float32)", error, FLOAT32_TOLERANCE)
    yield from check_greedy_text(theirs, original)


def check_greedy_text(theirs: Any, original: Original) -> Iterator[Receipt]:
    """Generate there, token by token with a cache, and compare with our logits for the whole text.

    Rounding decides between tokens with equal logits, so a generated token may be below our largest logit by that.
    """
    model, prompt = original.model, original.tokenizer.encode(PROMPT, start=True)[: original.model.context_size // 2]
    tokens_BT = torch.tensor([prompt])
    done = theirs.generate(
        tokens_BT,
        attention_mask=torch.ones_like(tokens_BT),
        do_sample=False,
        max_new_tokens=min(NUM_GREEDY_TOKENS, model.context_size - len(prompt)),
        output_logits=True,
        return_dict_in_generate=True,
    )
    chosen_T1 = done.sequences[0, len(prompt) :, None]
    logits_TVocab = model.logits(done.sequences[:, :-1])[0, len(prompt) - 1 :]
    error = relative_error(torch.cat(done.logits), logits_TVocab)
    yield Receipt(f"the same logits there while generating {len(chosen_T1)} tokens", error, FLOAT32_TOLERANCE)
    scale = logits_TVocab.abs().max().clamp(min=1)
    logits_TVocab[:, suppressed_ids(model.vocab_size, original.tokenizer)] = -torch.inf
    below_T1 = logits_TVocab.amax(1, keepdim=True) - logits_TVocab.gather(1, chosen_T1)
    yield Receipt("the same greedy text there", float(below_T1.max() / scale), FLOAT32_TOLERANCE)
