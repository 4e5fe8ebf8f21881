"""Model card of a run: Markdown with the YAML header of the Hugging Face Hub.

All facts come from the run's folder, whose files may be old or damaged. The template can insert only what a filter has
made safe: `code` and `cell` (a code span, in prose and in a table), `plain`, `number`, `known` and `setting`.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeGuard

import yaml
from jinja2 import Environment

from lumiere import __version__
from lumiere.config.schema import DatasetConfig, ModelConfig, RunConfig
from lumiere.evaluation.loss import Evaluation
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run
from lumiere.report.rendering import new_environment
from lumiere.training.costs import count_parameters, weight_bytes

MAX_CHARACTERS = 200
"""Of a value from a file."""
MAX_NUMBER = 1e300
"""Above it, an integer cannot be formatted like a float."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
SPLITS = ("train", "validation", "test")
METRICS = {
    "loss": "Loss (nats/token)",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "word_perplexity": "Word perplexity",
    "mean_batch_loss": "Mean batch loss",
    "mean_batch_perplexity": "Mean batch perplexity",
}
"""Metric types of the header with their titles."""


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card states.

    Attributes:
        record: contents of `run.json`; any value may be missing.
        checkpoint: `best`, or `latest` if there is no best.
        step: training steps of the checkpoint.
        evaluation: of the checkpoint on the validation split.
        num_tokens_used: ids that the tokenizer produces.
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


def card_checkpoint(run: Run) -> tuple[str, int]:
    """Return name and step of the checkpoint that a card describes.

    Raises:
        CheckpointError: the run has none, or it is damaged.
    """
    manager = CheckpointManager(run.path.parent)
    name = manager.resolve(run, "best")
    return name, manager.load(run, name, groups=()).step


def kept_evaluation(record: RunRecord, step: int) -> Evaluation | None:
    """Return the evaluation that training recorded for the checkpoint of `step`.

    Returns:
        None if there is none: the run is older, was killed between two writes, or is damaged.
    """
    kept = record.best_evaluation
    if kept.get("step") != step:
        return None
    values: dict[str, Any] = {}
    for field in fields(Evaluation):
        value = kept.get(field.name)
        if value is None and field.name.endswith("perplexity"):
            value = math.inf  # JSON has no infinity
        expected = int if field.type is int else int | float
        if isinstance(value, bool) or not isinstance(value, expected) or not (value <= MAX_NUMBER or value == math.inf):
            return None
        values[field.name] = value
    return Evaluation(**values) if math.isfinite(values["loss"]) else None


def gather(run: Run, checkpoint: str, step: int, evaluation: Evaluation) -> CardFacts:
    """Collect the facts of a run.

    Raises:
        LumiereError: its config or tokenizer cannot be read.
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
        on_hub=HUB_NAME.fullmatch(config.dataset.name) is not None and not os.path.exists(config.dataset.name),
    )


FEEDFORWARDS = {"swiglu": "SwiGLU", "geglu": "GeGLU", "gelu": "GELU", "gelu_tanh": "GELU", "relu": "ReLU"}
NORMS = {"rms": "RMSNorm", "layer": "LayerNorm", "layer_plain": "LayerNorm without parameters"}
SHAPE = {"embedding_size", "context_size", "num_layers", "num_heads", "d_key", "d_value", "d_ff", "dropout"}
"""Settings that every card states."""
NAMED = {"norm", "feedforward", "positions", "num_key_value_heads", "tie_embeddings", "zero_output_init"}
"""Settings that have a line of their own."""


def model_card(facts: CardFacts) -> str:
    """Render the card as a `README.md` for the Hub."""
    config, record = facts.config, facts.record
    parameters, versions = count_parameters(config), record.versions
    parts = {
        "Token embedding" if parameters.output_head else "Token embedding and output head": parameters.token_embedding,
        "Positions": parameters.positions,
        "Attention": parameters.attention,
        "Feed-forward": parameters.feedforward,
        "Norms": parameters.norms,
        **({"Output head": parameters.output_head} if parameters.output_head else {}),
    }
    splits, epoch = record.splits, record.epoch
    version, fingerprint = versions.get("lumiere"), record.corpus_sha256
    changed = {
        name: value
        for name, value in config.model.model_dump(exclude=SHAPE).items()
        if value != getattr(ModelConfig(), name)
    }
    values = {
        "feedforwards": FEEDFORWARDS,
        "norms": NORMS,
        "changed_settings": list(changed.items()),
        "other_settings": [(name, value) for name, value in changed.items() if name not in NAMED],
        **{field.name: getattr(facts, field.name) for field in fields(CardFacts)},
        "run_id": facts.run_name.split("_")[1],
        "parameters": parameters,
        "parts": [part for part in parts.items() if part[1]],
        "weight_megabytes": weight_bytes(config) / 1e6,
        "corpus": corpus_name(config.dataset),
        "files": file_names(config.dataset.data_files),
        "language": known_language(config.dataset),
        "fingerprint": fingerprint if isinstance(fingerprint, str) else None,
        "splits": [(name, splits[name]) for name in SPLITS if splits.get(name)],
        "context_bytes": context_bytes(facts),
        "part_of_epoch": epoch if is_number(epoch) and 0 <= epoch < 1 else None,
        "settings": config.training.model_dump(),
        "ancestors": record.ancestors,
        "versions": versions,
        "version": version if isinstance(version, str) and version.replace(".", "").isalnum() else __version__,
    }
    text = environment().get_template("model_card.md.j2").render(values)
    return f"---\n{header(facts)}---\n\n{text}"


def header(facts: CardFacts) -> str:
    """The YAML header without its lines of dashes. Keys with unknown values are left out."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset = facts.config.dataset
    corpus, language = printable(corpus_name(dataset)), known_language(dataset)
    scores = {name: getattr(facts.evaluation, name) for name in METRICS}
    data = ModelCardData(
        language=[language] if language else None,
        license="mit",
        library_name="lumiere",
        pipeline_tag="text-generation",
        tags=["lumiere", "gpt", "transformer", "small-language-model", "interpretability"],
        datasets=[dataset.name] if facts.on_hub else None,
        model_name=facts.run_name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=corpus,
                dataset_name=corpus,
                dataset_config=printable(dataset.subset) if dataset.subset else None,
                dataset_split="validation",
                metric_type=name,
                metric_value=round(score, 6),
                metric_name=METRICS[name],
            )
            for name, score in scores.items()
            if math.isfinite(score)
        ],
    )
    # Without line folding: a folded value could put dashes at the start of a line, where the header would end.
    return yaml.safe_dump(data.to_dict(), sort_keys=False, allow_unicode=True, width=math.inf)


def corpus_name(settings: DatasetConfig) -> str:
    """The name of the corpus; of a path only the last part, because the location is private."""
    if settings.data_files is not None:
        return ", ".join(file_names(settings.data_files))
    return base_name(settings.name)


def base_name(name: str) -> str:
    """The last part of a path; any other name as it is."""
    is_path = name.startswith((".", "/", "~")) or os.path.exists(name) or "\\" in name
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return last if is_path and last.strip(".~") else name


def file_names(data_files: str | list[str] | Mapping[str, str | list[str]] | None) -> list[str]:
    """The names of the files, without their folders."""
    match data_files:
        case None:
            return []
        case str():
            return [data_files.replace("\\", "/").rpartition("/")[2]]
        case _:
            items = data_files if isinstance(data_files, list) else data_files.values()
            return [name for item in items for name in file_names(item)]


def known_language(dataset: DatasetConfig) -> str | None:
    """`en` for corpora that are known to be English, otherwise None."""
    is_wikitext = dataset.name in ("wikitext", "Salesforce/wikitext") or (dataset.subset or "").startswith("wikitext-")
    return "en" if dataset.name == "stories" or is_wikitext else None


def context_bytes(facts: CardFacts) -> float | None:
    """Bytes of text that the context holds on average; None if the record does not say."""
    split = facts.record.splits.get("train", {})
    size, tokens = split.get("num_bytes"), split.get("num_tokens")
    if not (type(size) is int and type(tokens) is int and 0 < tokens <= size < 2**63):
        return None
    return facts.config.model.context_size * size / tokens


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Markdown(str):
    """Text that is safe to insert into the card; made by filters only."""


@cache
def environment() -> Environment:
    # HTML escapes would show in code spans, and do not protect against bars and backticks.
    found = new_environment(autoescape=False, finalize=only_markdown)
    found.filters |= {"code": code, "cell": cell, "plain": plain, "number": number, "known": known, "setting": setting}
    found.filters |= {"python": lambda value: Markdown(repr(value).replace("'", '"'))}  # of a model setting
    return found


def only_markdown(value: Any) -> Any:
    """Refuse text that no filter has made safe."""
    if not isinstance(value, Markdown | int):
        raise TypeError(f"{value!r} needs a filter")
    return value


def code(text: str) -> Markdown:
    """A code span, in which nothing is markup (CommonMark 0.31, section 6.1)."""
    text = printable(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    # One space at each side is stripped; without it a backtick at an end would belong to the fence.
    padding = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) or not text.strip() else ""
    return Markdown(f"{fence}{padding}{text or ' '}{padding}{fence}")


def cell(text: str) -> Markdown:
    """A code span in a table, where bars end a cell even inside code (GFM 0.29, section 4.10)."""
    return Markdown(code(text).replace("|", "\\|"))


def plain(text: str) -> Markdown:
    """Words as they are; anything that could be markup becomes a code span."""
    return Markdown(text) if re.fullmatch(r"[\w .-]+", text, re.ASCII) else cell(text)


def number(value: Any, form: str) -> Markdown:
    """A number in a format, or `unknown`."""
    try:
        return Markdown(format(value, form) if is_number(value) else "unknown")
    except (OverflowError, ValueError):
        return Markdown("unknown")


def known(value: Any) -> Markdown:
    """A text of the record, or `unknown`."""
    return cell(value) if isinstance(value, str) and value else Markdown("unknown")


def setting(value: Any) -> Markdown:
    """The value of a setting."""
    match value:
        case None | []:
            return Markdown("none")
        case bool():
            return Markdown("yes" if value else "no")
        case list():
            return Markdown(", ".join(cell(str(item)) for item in value))
        case str():
            return cell(value)
        case _:
            return Markdown(f"{value:g}" if isinstance(value, float) else value)


def printable(text: str) -> str:
    """The text in one short line, with control characters and line breaks escaped."""
    text = text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 3] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
