"""Turn pydantic's findings into one error that names the dotted path, the value, and the nearest valid key."""

import re

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lumiere.config.schema import RotaryScaling, RunConfig
from lumiere.errors import MAX_LENGTH, ConfigError, nearest, printable, quoted, shortened

LIMITS = {
    "greater_than": ("gt", "must be more than {}"),
    "greater_than_equal": ("ge", "must be at least {}"),
    "less_than": ("lt", "must be less than {}"),
    "less_than_equal": ("le", "must be at most {}"),
    "literal_error": ("expected", "must be {}"),
}
PROBLEMS = {
    "string_type": "must be text",
    "dict_type": "must be text",
    "string_unicode": "must be valid text",
    "list_type": "must be a list",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be auto, cpu, cuda, cuda:<number> or mps",
}
NESTED = ("model", "rotary_scaling")
"""The setting that is a mapping with keys of its own."""
MAX_PATHS = 5
"""Maximum number of further wrong keys that a message lists."""

SYNONYMS: dict[str, tuple[str, str]] = {
    name: (trainer, ours)
    for ours, names in {
        "model.embedding_size": {
            "n_embd": "nanoGPT", "hidden_size": "Hugging Face", "d_model": "TransformerLens", "dim": "torchtitan"
        },
        "model.context_size": {
            "block_size": "nanoGPT", "max_position_embeddings": "Hugging Face", "max_seq_length": "litgpt",
            "seq_len": "torchtitan", "n_ctx": "TransformerLens", "n_positions": "GPT-2", "seq_length": "Megatron",
            "max_seq_len": "torchtitan", "sequence_len": "nanochat", "max_sequence_length": "OLMo",
        },
        "model.num_layers": {"n_layer": "nanoGPT", "n_layers": "TransformerLens", "num_hidden_layers": "Hugging Face"},
        "model.num_heads": {
            "n_head": "nanoGPT", "n_heads": "TransformerLens", "num_attention_heads": "Hugging Face", "nhead": "PyTorch"
        },
        "model.d_key": {"head_dim": "Hugging Face", "d_head": "TransformerLens", "kv_channels": "Megatron"},
        "model.d_ff": {
            "n_inner": "GPT-2", "intermediate_size": "Hugging Face", "d_mlp": "TransformerLens",
            "hidden_dim": "torchtitan", "dim_feedforward": "PyTorch", "ffn_hidden_size": "Megatron", "ffn_dim": "OPT",
        },
        "model.dropout": {
            "attn_pdrop": "GPT-2", "resid_pdrop": "GPT-2", "embd_pdrop": "GPT-2",
            "attention_dropout": "Hugging Face", "hidden_dropout_prob": "Hugging Face", "hidden_dropout": "Megatron",
        },
        "model.positions": {"position_embedding_type": "Hugging Face", "positional_embedding_type": "TransformerLens"},
        "model.num_key_value_heads": {
            "n_kv_head": "nanochat", "n_kv_heads": "torchtitan", "num_kv_heads": "vLLM", "n_query_groups": "litgpt",
            "n_key_value_heads": "TransformerLens", "num_query_groups": "Megatron",
        },
        "model.feedforward": {
            "activation": "PyTorch", "activation_function": "GPT-2", "hidden_act": "Hugging Face",
            "act_fn": "TransformerLens", "mlp_class_name": "litgpt", "hidden_activation": "Gemma",
            "activation_type": "OLMo", "gated_mlp": "TransformerLens", "attn_only": "TransformerLens",
        },
        "model.norm": {
            "norm_type": "OLMo", "normalization_type": "TransformerLens", "norm_class_name": "litgpt",
            "layer_norm_type": "OLMo", "normalization": "Megatron",
        },
        "model.norm_epsilon": {
            "rms_norm_eps": "Llama", "layer_norm_eps": "Hugging Face", "layer_norm_epsilon": "GPT-2",
            "norm_eps": "torchtitan", "layernorm_epsilon": "Megatron",
        },
        "model.bias": {
            "attention_bias": "Llama", "mlp_bias": "Llama", "qkv_bias": "Hugging Face", "include_bias": "OLMo",
            "add_bias_linear": "Megatron", "add_qkv_bias": "Megatron",
        },
        "model.tie_embeddings": {
            "tie_word_embeddings": "Hugging Face", "tie_weights": "Hugging Face", "weight_tying": "OLMo"
        },
        "model.rotary_base": {"rope_theta": "Hugging Face", "rope_base": "litgpt", "rotary_emb_base": "GPT-NeoX"},
        "model.rotary_fraction": {
            "partial_rotary_factor": "Hugging Face", "rotary_pct": "GPT-NeoX", "rotary_percentage": "litgpt",
            "rotary_percent": "Megatron",
        },
        "model.rotary_scaling": {"rope_scaling": "Hugging Face", "rope_parameters": "Hugging Face"},
        "model.attention_windows": {
            "sliding_window": "Hugging Face", "window_size": "GPT-Neo", "attention_layers": "GPT-Neo",
            "attn_types": "TransformerLens",
        },
        "model.parallel_blocks": {
            "use_parallel_residual": "GPT-NeoX", "parallel_attn_mlp": "TransformerLens", "parallel_residual": "litgpt"
        },
        "model.query_key_norm": {
            "qk_norm": "torchtitan", "use_qk_norm": "TransformerLens", "norm_qk": "litgpt", "qk_layernorm": "Megatron"
        },
        "tokenizer.vocab_size": {"d_vocab": "TransformerLens", "padded_vocab_size": "litgpt"},
        "training.loss_positions": {"completion_only_loss": "TRL", "train_on_inputs": "Axolotl"},
        "dataset.text_column": {"dataset_text_field": "TRL"},
        "dataset.data_files": {"train_file": "Hugging Face", "data_path": "Megatron"},
        "dataset.name": {"dataset_name": "Hugging Face"},
        "dataset.subset": {"dataset_config_name": "Hugging Face"},
        "training.gradient_clip_norm": {"grad_clip": "nanoGPT", "max_grad_norm": "Hugging Face", "max_norm": "litgpt"},
        "training.warmup_steps": {"warmup_iters": "nanoGPT", "lr_warmup_steps": "litgpt"},
        "training.max_steps": {"max_iters": "nanoGPT", "num_steps": "TransformerLens"},
        "training.max_epochs": {"num_train_epochs": "Hugging Face", "epochs": "litgpt"},
        "training.beta1": {"adam_beta1": "Hugging Face"},
        "training.beta2": {"adam_beta2": "Hugging Face"},
        "training.activation_checkpointing": {"gradient_checkpointing": "Hugging Face"},
        "training.precision": {"bf16": "Hugging Face", "dtype": "nanoGPT"},
        "training.loggers": {"report_to": "Hugging Face", "wandb_log": "nanoGPT"},
        "training.optimizer": {"optim": "Hugging Face"},
        "training.learning_rate": {"lr": "PyTorch"},
        "training.patience": {"early_stopping_patience": "Hugging Face"},
        "training.stopping_threshold": {"early_stopping_threshold": "Hugging Face", "min_delta": "Lightning"},
        "training.batch_size": {"per_device_train_batch_size": "Hugging Face", "global_batch_size": "litgpt"},
        "training.eval_interval": {"eval_steps": "Hugging Face"},
        "training.log_interval": {"logging_steps": "Hugging Face"},
        "training.checkpoint_interval": {"save_steps": "Hugging Face", "save_interval": "litgpt"},
        "training.schedule": {"lr_scheduler_type": "Hugging Face"},
        "training.compile": {"torch_compile": "Hugging Face"},
    }.items()
    for name, trainer in names.items()
}  # fmt: skip
"""What other trainers call our settings: by their name, the trainer and our dotted path."""

UNAVAILABLE: dict[str, str] = {
    name: instead
    for names, instead in {
        "init_from from_pretrained pretrained model_name_or_path": (
            "lumiere train CONFIG --from RUN starts from the weights of a run"
        ),
        "model.name model_name model_type": (
            "the settings in `model` choose the architecture; lumiere train small is a size"
        ),
        "tokenizer.name tokenizer.type tokenizer_name": (
            "tokenizer.path takes an existing tokenizer; otherwise one of tokenizer.vocab_size tokens is trained"
        ),
        "attn_scale query_pre_attn_scalar": (
            "model.attention_scale is the factor of the attention scores; null is 1 / sqrt(d_key)"
        ),
        "untie_embeddings_and_output_weights": "model.tie_embeddings=false unties them",
        "model.sliding_window_size": (
            "model.attention_windows limits what layers see; dataset.sliding_window_size is the overlap of windows"
        ),
        "betas adam_betas": "training.beta1 and training.beta2 are the two",
        "min_lr min_learning_rate lr_decay_iters min_lr_ratio": (
            "training.schedule sets the shape of the decay to zero, training.decay_fraction its length"
        ),
        "out_dir output_dir": "--runs-dir or LUMIERE_RUNS_DIR sets where runs are stored",
        "eval_iters": "evaluation always scores the whole validation split; training.eval_interval sets how often",
    }.items()
    for name in names.split()
}
"""Settings of other trainers that Lumiere lacks, by name or dotted path: what to use instead."""


def config_error(error: ValidationError) -> ConfigError:
    """Return the first problem as message and hint, with the paths of the others."""
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    message, hint = describe(details[0])
    paths = list(dict.fromkeys(map(dotted_path, details)))[1:]
    if paths:
        rest = f" and {len(paths) - MAX_PATHS} more" if len(paths) > MAX_PATHS else ""
        message += f" (also wrong: {', '.join(paths[:MAX_PATHS])}{rest})"
    return ConfigError(message, hint)


def describe(detail: ErrorDetails) -> tuple[str, str]:
    """Return one of pydantic's findings as message and hint."""
    path, value, context = dotted_path(detail), quoted(detail["input"]), detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden" | "invalid_key":
            return f"unknown key {path}", hint_for_key(path)
        case "missing":
            return f"{path} is missing", hint_for_value(path)
        case "inconsistent":
            return f"{path} {detail['msg']}", hint_for_value(path)
        case "model_type" | "model_attributes_type":
            return f"{path} must be a section of keys, got {value}", f"write {path}: and its keys below it, indented"
        case "string_unicode" if path not in setting_paths():  # a key, for which pydantic gives the path of its section
            return f"a key{f' of {path}' if path else ''} is not valid text: {value}", hint_for_key(f"{path}.")
        case kind if kind in LIMITS:
            key, template = LIMITS[kind]
            problem = template.format(context[key])
            if kind == "literal_error":
                choices = re.findall(r"'([^']*)'", context[key])
                if guess := nearest(str(detail["input"]), choices):
                    return f"{path} {problem}, got {value}", f"did you mean {guess}?"
        case kind:
            problem = PROBLEMS.get(kind, detail["msg"])
    return f"{path} {problem}, got {value}", hint_for_value(path)


def dotted_path(detail: ErrorDetails) -> str:
    """Return a path such as `model.num_heads`, without the branches that pydantic adds for unions."""
    if path := detail.get("ctx", {}).get("path"):
        return path
    depth = 3 if detail["loc"][:2] == NESTED else 2
    return ".".join(shortened(printable(str(part)), MAX_LENGTH) for part in detail["loc"][:depth])


def hint_for_key(path: str) -> str:
    """Return what to write instead of an unknown key."""
    if path.startswith(f"{'.'.join(NESTED)}."):
        return f"it takes {', '.join(RotaryScaling.model_fields)}"
    section, _, leaf = path.rpartition(".")
    leaf = leaf.lower()
    if instead := UNAVAILABLE.get(path.lower()) or UNAVAILABLE.get(leaf):
        return instead
    if leaf in SYNONYMS:
        trainer, ours = SYNONYMS[leaf]
        return f"{trainer}'s {leaf} is {ours} here"
    keys = [key for key in setting_paths() if key.rpartition(".")[2] == leaf]
    if keys and leaf != "name":  # `name` is too generic to suggest another section
        return f"it belongs to another section: {' or '.join(keys)}"
    in_section = {key.rpartition(".")[2]: key for key in setting_paths() if key.startswith(f"{section}.")}
    anywhere = {key.rpartition(".")[2]: key for key in setting_paths()}
    for candidates in (in_section, anywhere):
        if guess := nearest(leaf, candidates):
            return f"did you mean {candidates[guess]}?"
    return f"valid keys there: {', '.join(in_section or RunConfig.model_fields)}"


def hint_for_value(path: str) -> str:
    """Return the description of a setting and its default."""
    section, leaf = path.split(".")[:2]
    model = RunConfig.model_fields[section].default
    description = type(model).model_fields[leaf].description or ""
    default = getattr(model, leaf)
    return f"{section}.{leaf}: {description} Default: {'null' if default in (None, []) else default}"


def setting_paths() -> list[str]:
    """Return the dotted paths of all settings."""
    sections: dict[str, BaseModel] = {name: field.default for name, field in RunConfig.model_fields.items()}
    return [f"{name}.{leaf}" for name, section in sections.items() for leaf in type(section).model_fields]
