"""Names from other trainers, so that the error for an unknown key can say what exists here."""

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
