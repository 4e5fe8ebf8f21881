"""From pydantic's findings to one error that names the dotted path and the way out."""

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lumiere.config.schema import RunConfig
from lumiere.errors import ConfigError, nearest, printable, shortened

LIMITS = {
    "greater_than": ("gt", "must be more than {}"),
    "greater_than_equal": ("ge", "must be at least {}"),
    "less_than": ("lt", "must be less than {}"),
    "less_than_equal": ("le", "must be at most {}"),
    "literal_error": ("expected", "must be {}"),
}
MAX_LENGTH = 60  # of a value or of a key in a message
MAX_PATHS = 5  # as many keys a message names


def config_error(error: ValidationError) -> ConfigError:
    """The first problem as message and hint, with the paths of the others."""
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    first, *others = details
    message, hint = describe(first)
    paths = list(dict.fromkeys(path for path in map(dotted_path, others) if path != dotted_path(first)))
    if paths:
        rest = f" and {len(paths) - MAX_PATHS} more" if len(paths) > MAX_PATHS else ""
        message += f" (also wrong: {', '.join(paths[:MAX_PATHS])}{rest})"
    return ConfigError(message, hint)


def describe(detail: ErrorDetails) -> tuple[str, str]:
    """One of pydantic's findings as message and hint."""
    path, value, context = dotted_path(detail), quoted(detail["input"]), detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden" | "invalid_key":
            return f"unknown key {path}", hint_for_key(path)
        case "inconsistent":
            return f"{path} {detail['msg']}", hint_for_value(path)
        case "model_type" | "model_attributes_type":
            return (
                f"{path} must be a section of keys, not {value}",
                f"write {path}: and its keys below it, indented",
            )
        case "string_unicode" if path not in setting_paths():  # of a key, for which pydantic gives its section's path
            return f"a key{f' of {path}' if path else ''} is not valid text, but {value}", hint_for_key(f"{path}.")
        case "string_type" | "dict_type":
            problem = "must be text"
        case "string_unicode":
            problem = "must be valid text"
        case "list_type":
            problem = "must be a list"
        case "string_too_short":
            problem = "must not be empty"
        case "string_pattern_mismatch":
            problem = "must be auto, cpu, cuda, cuda:<number> or mps"
        case kind if kind in LIMITS:
            key, template = LIMITS[kind]
            problem = template.format(context[key])
            if kind == "literal_error" and (guess := nearest(str(detail["input"]), quoted_names(context[key]))):
                return f"{path} {problem}, not {value}", f"did you mean {guess}?"
        case _:
            problem = detail["msg"]
    return f"{path} {problem}, not {value}", hint_for_value(path)


def dotted_path(detail: ErrorDetails) -> str:
    """`model.num_heads`, without the branches that pydantic adds for unions."""
    if path := detail.get("ctx", {}).get("path"):
        return path
    return ".".join(shortened(printable(str(part)), MAX_LENGTH) for part in detail["loc"][:2])


def hint_for_key(path: str) -> str:
    """Where the value of an unknown key belongs."""
    section, _, leaf = path.rpartition(".")
    leaf = leaf.lower()
    if instead := UNAVAILABLE.get(path.lower()) or UNAVAILABLE.get(leaf):
        return instead
    if leaf in SYNONYMS:
        trainer, ours = SYNONYMS[leaf]
        return f"{trainer}'s {leaf} is {ours} here"
    keys = [key for key in setting_paths() if key.rpartition(".")[2] == leaf]
    if keys and leaf != "name":  # which says too little to be moved to another section
        return f"it belongs to another section: {' or '.join(keys)}"
    in_section = {key.rpartition(".")[2]: key for key in setting_paths() if key.startswith(f"{section}.")}
    anywhere = {key.rpartition(".")[2]: key for key in setting_paths()}
    for candidates in (in_section, anywhere):
        if guess := nearest(leaf, candidates):
            return f"did you mean {candidates[guess]}?"
    names = in_section or dict.fromkeys(RunConfig.model_fields)
    return f"known there: {', '.join(names)}"


def hint_for_value(path: str) -> str:
    """What the key at `path` means, and what it is by default."""
    section, _, leaf = path.partition(".")
    model = RunConfig.model_fields[section].default
    field = type(model).model_fields[leaf]
    meaning = (field.description or "").split("\n")[0]
    default = getattr(model, leaf)
    return f"{path}: {meaning} Default: {'empty' if default in (None, []) else default}"


def quoted_names(text: str) -> list[str]:
    """The choices in pydantic's list of them, `'cosine', 'linear' or 'constant'`."""
    return re.findall(r"'([^']*)'", text)


def setting_paths() -> list[str]:
    """The dotted paths of all settings."""
    sections: dict[str, BaseModel] = {name: field.default for name, field in RunConfig.model_fields.items()}
    return [f"{name}.{leaf}" for name, section in sections.items() for leaf in type(section).model_fields]


def quoted(value: Any) -> str:
    """`value` as short, printable text. Of what is no single value only its kind: a text of it has no bounds."""
    match value:
        case int() if value.bit_length() > 1000:  # Python refuses to write out the largest
            return "a number of hundreds of digits"
        case int() | float() | None:
            return shortened(str(value), MAX_LENGTH)
        case str() | Path():
            return f"'{shortened(printable(str(value)), MAX_LENGTH)}'"
        case _:
            return f"a {type(value).__name__}"


SYNONYMS: dict[str, tuple[str, str]] = {
    "n_embd": ("nanoGPT", "model.embedding_size"),
    "hidden_size": ("Hugging Face", "model.embedding_size"),
    "d_model": ("TransformerLens", "model.embedding_size"),
    "n_inner": ("GPT-2", "model.d_ff"),
    "dim": ("torchtitan", "model.embedding_size"),
    "block_size": ("nanoGPT", "model.context_size"),
    "max_position_embeddings": ("Hugging Face", "model.context_size"),
    "max_seq_length": ("litgpt", "model.context_size"),
    "seq_len": ("torchtitan", "model.context_size"),
    "n_ctx": ("TransformerLens", "model.context_size"),
    "n_layer": ("nanoGPT", "model.num_layers"),
    "n_layers": ("TransformerLens", "model.num_layers"),
    "num_hidden_layers": ("Hugging Face", "model.num_layers"),
    "n_head": ("nanoGPT", "model.num_heads"),
    "n_heads": ("TransformerLens", "model.num_heads"),
    "num_attention_heads": ("Hugging Face", "model.num_heads"),
    "head_dim": ("Hugging Face", "model.d_key"),
    "d_head": ("TransformerLens", "model.d_key"),
    "intermediate_size": ("Hugging Face", "model.d_ff"),
    "d_mlp": ("TransformerLens", "model.d_ff"),
    "hidden_dim": ("torchtitan", "model.d_ff"),
    "d_vocab": ("TransformerLens", "tokenizer.vocab_size"),
    "grad_clip": ("nanoGPT", "training.gradient_clip_norm"),
    "max_grad_norm": ("Hugging Face", "training.gradient_clip_norm"),
    "max_norm": ("litgpt", "training.gradient_clip_norm"),
    "warmup_iters": ("nanoGPT", "training.warmup_steps"),
    "lr_warmup_steps": ("litgpt", "training.warmup_steps"),
    "max_iters": ("nanoGPT", "training.max_steps"),
    "num_steps": ("TransformerLens", "training.max_steps"),
    "adam_beta1": ("Hugging Face", "training.beta1"),
    "adam_beta2": ("Hugging Face", "training.beta2"),
    "attn_pdrop": ("GPT-2", "model.dropout"),
    "resid_pdrop": ("GPT-2", "model.dropout"),
    "embd_pdrop": ("GPT-2", "model.dropout"),
    "attention_dropout": ("Hugging Face", "model.dropout"),
    "hidden_dropout_prob": ("Hugging Face", "model.dropout"),
    "position_embedding_type": ("Hugging Face", "model.positions"),
    "gradient_checkpointing": ("Hugging Face", "training.activation_checkpointing"),
    "bf16": ("Hugging Face", "training.precision"),
    "report_to": ("Hugging Face", "training.loggers"),
    "wandb_log": ("nanoGPT", "training.loggers"),
    "optim": ("Hugging Face", "training.optimizer"),
    "num_train_epochs": ("Hugging Face", "training.max_epochs"),
    "epochs": ("litgpt", "training.max_epochs"),
    "lr": ("PyTorch", "training.learning_rate"),
    "early_stopping_patience": ("Hugging Face", "training.patience"),
    "early_stopping_threshold": ("Hugging Face", "training.stopping_threshold"),
    "min_delta": ("Lightning", "training.stopping_threshold"),
    "per_device_train_batch_size": ("Hugging Face", "training.batch_size"),
    "global_batch_size": ("litgpt", "training.batch_size"),
    "eval_steps": ("Hugging Face", "training.eval_interval"),
    "logging_steps": ("Hugging Face", "training.log_interval"),
    "save_steps": ("Hugging Face", "training.checkpoint_interval"),
    "save_interval": ("litgpt", "training.checkpoint_interval"),
    "lr_scheduler_type": ("Hugging Face", "training.schedule"),
    "dtype": ("nanoGPT", "training.precision"),
    "torch_compile": ("Hugging Face", "training.compile"),
    "dataset_name": ("Hugging Face", "dataset.name"),
    "dataset_config_name": ("Hugging Face", "dataset.subset"),
}

KEYS_AND_VALUES = "every head has keys and values of its own; model.num_heads sets how many heads there are"
PRETRAINED = "training starts from random weights; lumiere train --resume RUN continues a run"
TOKENIZER = "the tokenizer is trained on the corpus; tokenizer.vocab_size sets its size"
BIAS = "no layer has a bias"
FEEDFORWARD = "the feed-forward part is always SwiGLU; model.d_ff sets its width"
NORM = "the norm is always RMSNorm, before each part"
DECAY = "training.schedule sets the shape of the decay, which ends at zero; training.decay_fraction its length"

UNAVAILABLE: dict[str, str] = {
    **dict.fromkeys(
        ("n_kv_head", "n_kv_heads", "num_kv_heads", "num_key_value_heads", "n_query_groups", "n_key_value_heads"),
        KEYS_AND_VALUES,
    ),
    **dict.fromkeys(("init_from", "from_pretrained", "pretrained", "model_name_or_path"), PRETRAINED),
    **dict.fromkeys(
        ("model.name", "model_name", "model_type"), "there is one architecture; lumiere train small is a size"
    ),
    **dict.fromkeys(("tokenizer.name", "tokenizer.path", "tokenizer.type", "tokenizer_name"), TOKENIZER),
    **dict.fromkeys(("bias", "qkv_bias", "attention_bias", "mlp_bias"), BIAS),
    **dict.fromkeys(("activation", "activation_function", "hidden_act", "act_fn"), FEEDFORWARD),
    **dict.fromkeys(("norm", "norm_type", "normalization", "normalization_type"), NORM),
    **dict.fromkeys(("min_lr", "min_learning_rate", "lr_decay_iters", "min_lr_ratio"), DECAY),
    **dict.fromkeys(("tie_word_embeddings", "tie_weights"), "the output head is always the token embedding"),
    **dict.fromkeys(("rope_theta", "rotary_base"), "model.positions=rotary always has the base 10,000"),
    **dict.fromkeys(("out_dir", "output_dir"), "--runs-dir or LUMIERE_RUNS_DIR says where runs are"),
    **dict.fromkeys(
        ("eval_iters",), "an evaluation scores the whole validation split; training.eval_interval says how often"
    ),
}
"""What other trainers have and Lumiere does not, by name or by dotted path: what exists instead."""
