"""The sections of a model card about the model: what it is, and what it is good for."""

from lumiere.report.card_facts import CardFacts
from lumiere.report.card_training import corpus_name, evaluated_checkpoint
from lumiere.report.markdown import bullets, code, table
from lumiere.training.costs import count_parameters, weight_bytes


def overview(facts: CardFacts) -> str:
    parameters = count_parameters(facts.config).total
    evaluation = facts.evaluation
    return (
        f"A GPT-style language model of {parameters:,} parameters, trained from scratch by Lumiere "
        f"on {code(corpus_name(facts.config.dataset))}. It continues text. It was made to learn how transformers work "
        f"and to be looked into, and not to be relied on for what it says.\n\n"
        f"This card is about {evaluated_checkpoint(facts)} of the run {code(facts.run_name)}: validation loss "
        f"{evaluation.loss:.4f} nats a token, perplexity {evaluation.perplexity:,.2f}."
    )


def architecture(facts: CardFacts) -> str:
    model = facts.config.model
    rows = [
        ("Type", "decoder-only transformer, causal"),
        ("Blocks", f"{model.num_layers}"),
        ("Attention heads in each", f"{model.num_heads}"),
        ("Width of the residual stream", f"{model.embedding_size}"),
        ("Width of a head's queries and keys, and of its values", f"{model.d_key}, {model.d_value}"),
        ("Feed-forward", f"SwiGLU, {model.d_ff} neurons"),
        ("Normalisation", "RMSNorm before each part, and after the last block"),
        ("Positions", "rotary" if model.positions == "rotary" else "learned"),
        ("Context", f"{model.context_size} tokens"),
        ("Vocabulary", f"{facts.config.tokenizer.vocab_size:,} rows"),
        ("Output head", "tied to the token embedding"),
        ("Dropout while training", f"{model.dropout:g}"),
    ]
    return table(["", ""], rows)


def improvements(facts: CardFacts) -> str:
    """What this config has in place of a plain transformer's LayerNorm after each part, ReLU, biases and Adam."""
    config = facts.config
    model, settings = config.model, config.training
    items = [
        "Pre-norm: each part reads a normalised residual stream and adds to the raw one, which makes training "
        "steadier (Xiong et al. 2020).",
        "RMSNorm instead of LayerNorm: no mean, no bias (Zhang and Sennrich 2019).",
        "SwiGLU instead of ReLU in the feed-forward part (Shazeer 2020).",
        "No biases in any linear map.",
        "The output head is the token embedding, which saves "
        f"{config.tokenizer.vocab_size * config.model.embedding_size:,} parameters (Press and Wolf 2017).",
    ]
    optional = [
        (model.positions == "rotary", "Rotary positions: attention depends on distances (Su et al. 2021)."),
        (model.zero_output_init, "What each part writes starts at zero, so that a block begins as the identity."),
        (
            settings.optimizer == "muon",
            "Muon for the blocks' matrices: each update is orthogonalised (Jordan et al. 2024). AdamW moves the rest.",
        ),
        (
            settings.optimizer == "adamw",
            "AdamW: weight decay apart from the gradient (Loshchilov and Hutter 2019).",
        ),
        (
            settings.random_window_offset,
            "Training windows are cut at other places in each epoch, so that a token is seen at many positions.",
        ),
        (
            bool(settings.ema_decay),
            "The weights are the exponential moving average of those that training went through.",
        ),
    ]
    items += [text for applies, text in optional if applies]
    return bullets(items)


def parameter_table(facts: CardFacts) -> str:
    parameters = count_parameters(facts.config)
    learned = facts.config.model.positions == "learned"
    parts = [
        ("Token embedding, which is the output head too", parameters.token_embedding),
        *([("Positions", parameters.positions)] if learned else []),
        ("Attention", parameters.attention),
        ("Feed-forward", parameters.feedforward),
        ("Norms", parameters.norms),
        ("**Total**", parameters.total),
    ]
    rows = [(name, f"{count:,}", f"{count / parameters.total:.1%}") for name, count in parts]
    return table(["Part", "Parameters", "Share"], rows)


def strengths(facts: CardFacts) -> str:
    config = facts.config
    items = [
        f"Small: {weight_bytes(config) / 1e6:,.1f} MB of float32 weights, which run on any CPU.",
        "Open to look into: attention weights and hidden states on request, and named hook points at every stage.",
        "Reads and writes any text: the tokenizer falls back to bytes, so there is no unknown character.",
        "Can be repeated: `config.yaml` in the run's folder is complete, and the seed decides the order of the data.",
    ]
    if config.training.snapshots:
        items.append("Its weights were kept while it learned, from step 0 on, so that its training can be studied.")
    return bullets(items)
