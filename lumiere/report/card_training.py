"""The sections of a model card about the text and the training."""

import os
from collections.abc import Mapping
from typing import Any

from lumiere.config.schema import DatasetConfig
from lumiere.report.card_facts import CardFacts
from lumiere.report.markdown import code, table

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
    if isinstance(fingerprint := facts.record.get("corpus_sha256"), str):
        rows.append(("Fingerprint of the encoded corpus", code(fingerprint)))
    parts = [table(["", ""], rows)]
    splits = facts.record.get("splits")
    if isinstance(splits, Mapping):
        known = [(name, splits[name]) for name in SPLITS if isinstance(splits.get(name), Mapping)]
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
    versions = record.get("versions")
    versions = versions if isinstance(versions, Mapping) else {}
    done = [
        ("Trained", f"{number(record.get('step'), ',')} steps, {number(record.get('epoch'), '.2f')} epochs"),
        ("Tokens", f"{number(record.get('tokens'), ',')}, padding left out"),
        ("Time", f"{number(record.get('training_seconds'), ',.0f')} s, evaluating and saving left out"),
        ("Computed", f"in {text(record.get('precision'))} on {text(record.get('device'))}"),
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
