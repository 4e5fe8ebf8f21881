"""A run's model card, in Markdown with the header of the Hugging Face Hub.

Everything in it is derived from the run. What comes from files stands in code spans, where nothing is markup.
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import yaml

from lumiere import __version__
from lumiere.config.schema import DatasetConfig, RunConfig
from lumiere.evaluation.loss import Evaluation
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run
from lumiere.training.costs import count_parameters, weight_bytes

LARGEST = 1e300
"""Beyond it a whole number is none that a format for floats takes."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class CardFacts:
    """Everything that is in a card.

    Attributes:
        record: what `run.json` says, of which nothing can be relied on.
        checkpoint: name of the checkpoint that the card is about: `best`, or `latest` where there is none.
        step: updates that it has seen.
        evaluation: of that checkpoint on the validation split.
        num_tokens_used: ids that the tokenizer gives out.
        on_hub: whether the corpus is a dataset of the Hugging Face Hub, and not a folder of that name.
    """

    run_name: str
    status: str
    config: RunConfig
    record: RunRecord
    checkpoint: str
    step: int
    evaluation: Evaluation
    num_tokens_used: int
    on_hub: bool

    @property
    def run_id(self) -> str:
        return self.run_name.split("_")[1]


def card_checkpoint(run: Run) -> tuple[str, int]:
    """The checkpoint that a card is about, and its step.

    Raises:
        CheckpointError: the run has none, or it is damaged.
    """
    manager = CheckpointManager(run.path.parent)
    name = manager.resolve(run, "best")
    return name, manager.load(run, name, groups=()).step


def kept_evaluation(record: RunRecord, step: int) -> Evaluation | None:
    """The evaluation of the checkpoint of `step` that the training left in the record.

    Returns:
        None where there is none: the run is older than that, was killed between two writes, or is damaged.
    """
    kept = record.best_evaluation
    if kept.get("step") != step:
        return None
    values: dict[str, Any] = {}
    for field in fields(Evaluation):
        value = kept.get(field.name)
        if value is None and field.name.endswith("perplexity"):
            value = math.inf  # which JSON does not have
        wanted = int if field.type is int else int | float
        if isinstance(value, bool) or not isinstance(value, wanted) or not (value <= LARGEST or value == math.inf):
            return None
        values[field.name] = value
    return Evaluation(**values) if math.isfinite(values["loss"]) else None


def gather(run: Run, checkpoint: str, step: int, evaluation: Evaluation) -> CardFacts:
    """The facts of a run.

    Raises:
        LumiereError: its config or its tokenizer cannot be read.
    """
    config = run.load_config()
    return CardFacts(
        run_name=run.name,
        status=run.status,
        config=config,
        record=run.record,
        checkpoint=checkpoint,
        step=step,
        evaluation=evaluation,
        num_tokens_used=len(run.load_tokenizer()),
        on_hub=is_on_hub(config.dataset),
    )


def is_on_hub(dataset: DatasetConfig) -> bool:
    """Whether the name is a Hub name, and no folder that is there."""
    return HUB_NAME.fullmatch(dataset.name) is not None and not os.path.exists(dataset.name)


def known_language(dataset: DatasetConfig) -> str | None:
    """`en` for the corpora that are known to be English; None for all others."""
    is_wikitext = dataset.name in ("wikitext", "Salesforce/wikitext") or (dataset.subset or "").startswith("wikitext-")
    return "en" if dataset.name == "stories" or is_wikitext else None


# The Hub's names of the metrics that it knows, and ours of the others.
METRICS = {
    "loss": ("loss", "Loss, nats a token"),
    "perplexity": ("perplexity", "Perplexity"),
    "bits_per_byte": ("bits_per_byte", "Bits per byte"),
    "word_perplexity": ("word_perplexity", "Word perplexity"),
    "mean_batch_loss": ("mean_batch_loss", "Mean batch loss"),
    "mean_batch_perplexity": ("mean_batch_perplexity", "Mean batch perplexity"),
}


def header(facts: CardFacts) -> str:
    """The header without its two lines of dashes. A key whose value is not known is left out."""
    config = facts.config
    language = known_language(config.dataset)
    values: dict[str, Any] = {
        "language": [language] if language else None,
        "license": "mit",
        "library_name": "lumiere",
        "pipeline_tag": "text-generation",
        "tags": ["lumiere", "gpt", "transformer", "small-language-model", "interpretability"],
        "datasets": [config.dataset.name] if facts.on_hub else None,
        "model-index": [{"name": facts.run_name, "results": [result(facts)]}],
    }
    kept = {key: value for key, value in values.items() if value is not None}
    # On one line each: a folded text could bring a line of dashes to the start of a line, where the header would end.
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=math.inf)


def result(facts: CardFacts) -> dict[str, Any]:
    """The evaluation in the form of the Hub's `model-index`."""
    settings = facts.config.dataset
    about = {"type": printable(corpus_name(settings)), "name": printable(corpus_name(settings))}
    if settings.subset:
        about["config"] = printable(settings.subset)
    figures = {name: getattr(facts.evaluation, name) for name in METRICS}
    metrics = [
        {"type": kind, "value": round(figures[name], 6), "name": title}
        for name, (kind, title) in METRICS.items()
        if math.isfinite(figures[name])
    ]
    task = {"type": "text-generation", "name": "Text Generation"}
    return {"task": task, "dataset": about | {"split": "validation"}, "metrics": metrics}


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
    epoch = record.epoch
    if epoch is not None and 0 <= epoch < 1:
        items.append(f"Training saw {epoch:.0%} of the training windows, each once: it could go on for longer.")
    if facts.status != "finished":
        items.append(
            f"The training had not come to its end when this card was written: its status was {code(facts.status)}."
        )
    return bullets(items)


def bytes_of_context(facts: CardFacts) -> str:
    """About how much text the context holds; empty where the record does not say what a token is worth."""
    split = facts.record.splits.get("train", {})
    size, tokens = split.get("num_bytes"), split.get("num_tokens")
    if not (type(size) is int and type(tokens) is int and 0 < tokens <= size < 2**63):
        return ""
    return f", about {facts.config.model.context_size * size / tokens:,.0f} bytes of text"


SPLITS = ("train", "validation", "test")


def dataset(facts: CardFacts) -> str:
    settings = facts.config.dataset
    rows = [("Corpus", corpus_source(facts))]
    if settings.subset:
        rows.append(("Subset", code(settings.subset)))
    if settings.data_files is not None:
        rows.append(("Files", ", ".join(code(name) for name in file_names(settings.data_files))))
    if settings.document_start:
        rows.append(("A document starts at each line that matches", code(settings.document_start)))
    size, overlap = facts.config.model.context_size + 1, settings.sliding_window_size
    rows.append(("Windows", f"{size} tokens of one document, each sharing {overlap} with the one before"))
    if (fingerprint := facts.record.corpus_sha256) is not None:
        rows.append(("Fingerprint of the encoded corpus", code(fingerprint)))
    parts = [table(["", ""], rows)]
    if splits := facts.record.splits:
        known = [(name, splits[name]) for name in SPLITS if name in splits]
        columns = ("num_documents", "num_tokens", "num_bytes")
        counts = [(name, *(number(split.get(key), ",") for key in columns)) for name, split in known]
        parts.append(table(["Split", "Documents", "Tokens", "Bytes of text"], counts))
    return "\n\n".join(parts)


def tokenization(facts: CardFacts) -> str:
    settings = facts.config.tokenizer
    used = facts.num_tokens_used
    rows = [
        ("Type", "byte-level BPE (Hugging Face `tokenizers`), trained on the training split"),
        ("Tokens", f"{used:,}" + (f" of {settings.vocab_size:,} rows" if used < settings.vocab_size else "")),
        ("Least frequency of a merged pair", f"{settings.min_frequency}"),
        ("Normalisation", settings.normalizer.upper() if settings.normalizer != "none" else "none"),
        ("Special tokens", "`<|sot|>` 0, `<|eot|>` 1, `<|pad|>` 2; a document is `<|sot|>text<|eot|>`"),
    ]
    return table(["", ""], rows)


def training(facts: CardFacts) -> str:
    record = facts.record
    versions = record.versions
    done = [
        ("Trained", f"{number(record.step, ',')} steps, {number(record.epoch, '.2f')} epochs"),
        ("Tokens", f"{number(record.tokens, ',')}, padding left out"),
        ("Time", f"{number(record.training_seconds, ',.0f')} s, evaluating and saving left out"),
        ("Computed", f"in {text(record.precision)} on {text(record.device)}"),
        ("Versions", f"Lumiere {text(versions.get('lumiere'))}, torch {text(versions.get('torch'))}"),
    ]
    settings = facts.config.training.model_dump()
    rows = [(code(f"training.{name}"), shown(value)) for name, value in settings.items()]
    return f"{table(['', ''], done)}\n\nThe complete settings:\n\n{table(['Setting', 'Value'], rows)}"


def corpus_name(settings: DatasetConfig) -> str:
    """What the corpus is called. Of a path only its last part: where it lay is nobody else's business."""
    if settings.data_files is not None:
        return ", ".join(file_names(settings.data_files))
    is_path = settings.name.startswith((".", "/", "~")) or os.path.exists(settings.name) or "\\" in settings.name
    last = settings.name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return last if is_path and last.strip(".~") else settings.name


BUILT_IN = {
    "stories": "`stories`: short English stories that a grammar of Lumiere makes",
    "chains": "`chains`: rows of letters that Lumiere draws, each by a rule of its own",
}
"""Lumiere's own corpora, in words."""


def corpus_source(facts: CardFacts) -> str:
    """The corpus, and what kind of one it is."""
    settings = facts.config.dataset
    if settings.name in BUILT_IN:
        return BUILT_IN[settings.name]
    kind = "of the Hugging Face Hub" if facts.on_hub else "on the trainer's machine"
    return f"{code(corpus_name(settings))}, {kind}"


def file_names(data_files: str | list[str] | dict[str, str | list[str]]) -> list[str]:
    """The names of the files, without their folders."""
    match data_files:
        case str():
            return [data_files.replace("\\", "/").rpartition("/")[2]]
        case list():
            return [name for item in data_files for name in file_names(item)]
        case _:
            return [name for item in data_files.values() for name in file_names(item)]


def evaluated_checkpoint(facts: CardFacts) -> str:
    """The checkpoint and its step."""
    return f"the checkpoint {code(facts.checkpoint)} (step {facts.step:,})"


def number(value: Any, form: str) -> str:
    """A number of the record in `form`, or `unknown`: any JSON may stand there."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "unknown"
    try:
        return format(value, form)
    except (OverflowError, ValueError):
        return "unknown"


def text(value: Any) -> str:
    """A text of the record, or `unknown`."""
    return code(value) if isinstance(value, str) and value else "unknown"


def shown(value: Any) -> str:
    """A setting's value."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(code(str(item)) for item in value) or "none"
        case float():
            return f"{value:g}"
        case str():
            return code(value)
        case _:
            return str(value)


PROMPT = "Once upon a time"


def loading(facts: CardFacts) -> str:
    return (
        "With Lumiere installed from its source (`lumiere` on PyPI is another project) and the run's folder in "
        "`runs/`:\n\n"
        f"{fenced(our_example(facts), 'python')}\n\n"
        "Or by hand, in the way of the Lumiére model card:\n\n"
        f"{fenced(cards_example(facts), 'python')}\n\n"
        "From a shell:\n\n"
        f"{fenced(f'lumiere generate --run {facts.run_id} --prompt {PROMPT!r}', 'bash')}"
    )


def our_example(facts: CardFacts) -> str:
    return (
        "from lumiere.generation.decoding import generate\n"
        "from lumiere.persistence.runs import RunStore\n"
        "\n"
        f'run = RunStore().open("{facts.run_id}")\n'
        f'model, tokenizer = run.load_model("{facts.checkpoint}"), run.load_tokenizer()\n'
        f'print("".join(generate(model, tokenizer, "{PROMPT}", max_new_tokens=50, seed=0)))'
    )


def cards_example(facts: CardFacts) -> str:
    model = facts.config.model
    positions = ', positions="rotary"' if model.positions == "rotary" else ""
    return (
        "from lumiere.models.transformer import Transformer\n"
        "from lumiere.persistence.checkpoint_manager import CheckpointManager\n"
        "checkpoint_manager = CheckpointManager()\n"
        "\n"
        f'checkpoint = checkpoint_manager.load_checkpoint("{facts.run_name}", "{facts.checkpoint}")\n'
        f"model = Transformer(vocab_size={facts.config.tokenizer.vocab_size}, embedding_size={model.embedding_size}, "
        f"context_size={model.context_size},\n"
        f"                    num_layers={model.num_layers}, num_heads={model.num_heads}, d_key={model.d_key}, "
        f"d_value={model.d_value}, d_ff={model.d_ff}{positions})\n"
        'model.load_state_dict(checkpoint["model_state_dict"])\n'
        "model.eval()"
    )


def evaluating(facts: CardFacts) -> str:
    batches = facts.evaluation.batch_size
    command = f"lumiere eval {facts.run_id} --checkpoint {facts.checkpoint} --split validation --batch-size {batches}"
    return f"{fenced(command, 'bash')}\n\nIt needs the corpus as it was; `--text FILE` scores any other text."


def licence(facts: CardFacts) -> str:
    lines = [
        "Lumiere is under the MIT licence, and this card names it for the weights too. Whoever publishes them may "
        "choose another one in the first lines of this file.",
        "The corpus has a licence of its own."
        if facts.config.dataset.name not in BUILT_IN
        else "The corpus is made by Lumiere and has no other licence.",
    ]
    if known_language(facts.config.dataset) and facts.config.dataset.name != "stories":
        lines[-1] = "The corpus has a licence of its own: WikiText is under CC BY-SA 3.0 and the GFDL."
    return "\n\n".join(lines)


def citation(facts: CardFacts) -> str:
    """What CITATION.cff says, as BibTeX; that file is not part of an installed package."""
    version = facts.record.versions.get("lumiere")
    version = version if isinstance(version, str) and version.replace(".", "").isalnum() else __version__
    return fenced(
        "@software{lumiere,\n"
        "  title = {Lumiere: train small GPT-style transformers and look inside them},\n"
        "  author = {{The Lumiere authors}},\n"
        f"  version = {{{version}}},\n"
        "  license = {MIT}\n"
        "}",
        "bibtex",
    )


LONGEST = 200
"""Characters of a value that are shown: a card is to be read."""


def code(text: str) -> str:
    """`text` as a code span, in which nothing is markup (CommonMark 0.31, section 6.1)."""
    text = printable(text)
    fence = "`" * (longest_run(text) + 1)
    # A space at each side is taken off again; without it a backtick at an end would belong to the fence.
    padding = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) or not text.strip() else ""
    return f"{fence}{padding}{text or ' '}{padding}{fence}"


def fenced(text: str, language: str = "") -> str:
    """`text`, which may have many lines, as a code block."""
    fence = "`" * max(3, longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already. A bar would end one, in a code span too (GFM 0.29, section 4.10)."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def bullets(items: Iterable[str]) -> str:
    """A list, one item a line."""
    return "\n".join(f"- {item}" for item in items)


def longest_run(text: str) -> int:
    """How many backticks stand side by side at most."""
    return max((len(run) for run in re.findall("`+", text)), default=0)


def printable(text: str) -> str:
    """`text` in one short line, with control characters and line ends made visible."""
    text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


SECTIONS = {
    "Overview": overview,
    "Architecture": architecture,
    "Improvements over a plain transformer": improvements,
    "Parameters": parameter_table,
    "Dataset": dataset,
    "Tokenization": tokenization,
    "Training": training,
    "Validation results": results,
    "Strengths": strengths,
    "Limitations": limitations,
    "How to load it": loading,
    "How to evaluate it": evaluating,
    "Licence": licence,
    "Citation": citation,
}


def model_card(facts: CardFacts) -> str:
    """The card as a `README.md` for the Hub: YAML header and Markdown, ending in a line end."""
    sections = [f"## {title}\n\n{section(facts)}" for title, section in SECTIONS.items()]
    return "\n\n".join([f"---\n{header(facts)}---", f"# Lumiere {facts.run_id}", *sections]) + "\n"
