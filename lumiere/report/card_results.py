"""The sections of a model card about how good the model is, and where that ends."""

from collections.abc import Mapping

from lumiere.report.card_facts import CardFacts, known_language
from lumiere.report.card_training import corpus_name, evaluated_checkpoint
from lumiere.report.markdown import bullets, code, table
from lumiere.training.costs import count_parameters


def results(facts: CardFacts) -> str:
    evaluation = facts.evaluation
    rows = [
        ("Loss", f"{evaluation.loss:.4f}", "nats a token, mean over all predicted tokens"),
        ("Perplexity", f"{evaluation.perplexity:,.2f}", "exp(loss)"),
        ("Bits per byte", f"{evaluation.bits_per_byte:.4f}", "comparable between tokenizers"),
        ("Word perplexity", f"{evaluation.word_perplexity:,.1f}", "words by white space, line ends counted"),
        ("Mean batch loss", f"{evaluation.mean_batch_loss:.4f}", "mean of the batches' mean losses"),
        ("Mean batch perplexity", f"{evaluation.mean_batch_perplexity:,.2f}", "mean of the batches' perplexities"),
        (
            "Batches",
            f"{evaluation.num_batches:,}",
            f"of {evaluation.batch_size} windows, {evaluation.num_windows:,} in all",
        ),
        ("Predicted tokens", f"{evaluation.num_tokens:,}", "those that two windows share are counted in each"),
    ]
    return (
        f"Of {evaluated_checkpoint(facts)} on the validation split, dropout off.\n\n"
        f"{table(['Figure', 'Value', 'What it is'], rows)}\n\n"
        "The Lumiére model card reports the two means over batches (4.4180 and 85.01 on WikiText-2 Raw, batches of "
        "32); compare like with like. The checkpoint was chosen by this split, so a split that was never looked at "
        "may score a little worse."
    )


def limitations(facts: CardFacts) -> str:
    config, record = facts.config, facts.record
    model = config.model
    items = [
        f"It sees {model.context_size} tokens at once{bytes_of_context(facts)}, and nothing of what was before.",
        f"With {count_parameters(config).total:,} parameters it knows little, and what it says need not be true.",
        f"It knows one corpus, {code(corpus_name(config.dataset))}, and repeats what is wrong or unfair in it; "
        "no text was filtered out, and none that it writes is.",
        "It continues text. It was not trained to follow instructions or to hold a conversation.",
    ]
    if known_language(config.dataset) == "en":
        items.append("English only.")
    if config.dataset.name == "stories":
        items.append("The stories come from a grammar: its losses say nothing about text that people wrote.")
    if config.dataset.name == "chains":
        items.append("The rows of letters are no language: the model is made to look inside, and not to write.")
    subset = config.dataset.subset or ""
    if subset.startswith("wikitext-") and subset.endswith("-raw-v1"):
        items.append(
            f"Figures on the raw text ({code(subset)}) and on {code(subset.replace('-raw', ''))} cannot be compared."
        )
    elif subset.startswith("wikitext-"):
        items.append(
            f"In {code(subset)} rare words are replaced by `<unk>`, which makes it easier than the raw text: its "
            "figures must not be compared with those of a raw subset, and the model writes `<unk>` itself."
        )
    epoch = record.get("epoch")
    if isinstance(epoch, int | float) and not isinstance(epoch, bool) and 0 <= epoch < 1:
        items.append(f"Training saw {epoch:.0%} of the training windows, each once: it could go on for longer.")
    if facts.status != "finished":
        items.append(
            f"The training had not come to its end when this card was written: its status was {code(facts.status)}."
        )
    return bullets(items)


def bytes_of_context(facts: CardFacts) -> str:
    """About how much text the context holds; empty where the record does not say what a token is worth."""
    splits = facts.record.get("splits")
    split = splits.get("train") if isinstance(splits, Mapping) else None
    if not isinstance(split, Mapping):
        return ""
    size, tokens = split.get("num_bytes"), split.get("num_tokens")
    if not (type(size) is int and type(tokens) is int and 0 < tokens <= size < 2**63):
        return ""
    return f", about {facts.config.model.context_size * size / tokens:,.0f} bytes of text"
