"""Every setting of a run: its name, its meaning, its default (the Lumiére model card's) and its limits."""

import contextlib
import json
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lumiere.files import MAX_INTEGER

# No two parts of it fit the same characters: of a long text that is no number, each is looked at once.
# Without leading zeros, which mean octal to some readers: 012.
NUMBER = re.compile(r"[+-]?((?:0|[1-9][0-9_]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def read_number(value: Any) -> float:
    """`value` as a finite float.

    Raises:
        PydanticCustomError: for booleans, NaN, infinities, and text that does not read as a number.
    """
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("number", "must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise PydanticCustomError("number", "must be a finite number")
    return number


def read_integer(value: Any) -> int:
    """`value` as a whole number; `2e3` counts, `2.5` does not."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        number = read_number(value)
    except PydanticCustomError:
        number = math.nan
    if not number.is_integer():
        raise PydanticCustomError("integer", "must be a whole number")
    # Text is read again as an integer, because a float holds whole numbers only up to 2^53.
    text = str(value).strip().replace("_", "")
    return int(text) if text.lstrip("+-").isdigit() else int(number)


def read_boolean(value: Any) -> bool:
    """`value` as true or false."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise PydanticCustomError("boolean", "must be true or false")
    return value


def read_names(value: Any) -> Any:
    """`value` as a list of names: `a, b` is one, which a shell writes more easily, and the empty value has none."""
    if value is None:
        return []
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


Integer = Annotated[int, BeforeValidator(read_integer)]
Number = Annotated[float, BeforeValidator(read_number)]
Boolean = Annotated[bool, BeforeValidator(read_boolean)]

PositiveInteger = Annotated[Integer, Field(ge=1, le=MAX_INTEGER)]
NonNegativeInteger = Annotated[Integer, Field(ge=0, le=MAX_INTEGER)]
Width = Annotated[Integer, Field(ge=1, le=1_000_000)]
Count = Annotated[Integer, Field(ge=1, le=1000)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NonNegativeNumber = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen, and strict about names: an unknown key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def read_none(cls, values: Any) -> Any:
        """Read the text `none` as the empty value, where a setting may be empty."""
        if not isinstance(values, dict):
            return values
        empty = {name for name, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        return {key: None if key in empty and value == "none" else value for key, value in values.items()}


class ModelConfig(Section):
    """The transformer's shape."""

    embedding_size: Width = 128
    """Width of the residual stream."""
    context_size: Width = 64
    """Longest sequence that the model sees, in tokens."""
    num_layers: Count = 4
    """Transformer blocks."""
    num_heads: Count = 4
    """Attention heads in each block."""
    d_key: Width = 32
    """Width of each head's queries and keys."""
    d_value: Width = 32
    """Width of each head's values."""
    d_ff: Width = 256
    """Hidden width of the feed-forward part (SwiGLU)."""
    dropout: Fraction = 0.1
    """Share of activations dropped while training, after the embeddings and after each part of a block."""
    positions: Literal["learned", "rotary"] = "learned"
    """How a token knows where it stands: `learned` embeddings or `rotary`, as in a stock Llama."""
    zero_output_init: Boolean = False
    """Start what each part writes to the residual stream at zero, so that every block begins as the identity."""


class TokenizerConfig(Section):
    """The byte-level BPE tokenizer, trained on the training split."""

    # 256 bytes and 3 special tokens are always there.
    vocab_size: Annotated[Integer, Field(ge=259, le=2**31)] = 4096
    """Rows of the embedding: the 3 special tokens, the 256 bytes and the merges."""
    min_frequency: PositiveInteger = 2
    """How often a pair must occur to be merged."""
    sample_bytes: PositiveInteger = 100_000_000
    """Text that the merges are learned from: the first documents of the training split, up to so many bytes."""
    normalizer: Literal["nfkc", "nfc", "none"] = "nfkc"
    """Unicode normalization of every text. `nfkc` turns `x²` into `x2`; take `nfc` or `none` for code."""


class DatasetConfig(Section):
    """The corpus, and how documents are cut into windows."""

    name: Annotated[str, Field(min_length=1)] = "stories"
    """`stories` or `chains` (built in), a Hub name, a local folder, or a builder: text, json, csv, parquet, arrow."""
    subset: str | None = None
    """Subset (Hugging Face calls it the configuration name), such as `wikitext-2-raw-v1`."""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """Files for a builder: a file, a folder or a pattern, a list of them, or a mapping of splits to them."""
    data_sha256: str | None = None
    """Hash of the local files that were read; a run records it. Files with other contents are refused."""
    text_column: Annotated[str, Field(min_length=1)] = "text"
    """The column that holds the text; `doc.text` is the column `text` within `doc`."""
    streaming: Boolean = False
    """Read the rows as they are needed, instead of downloading and converting the whole dataset first."""
    document_start: str | None = None
    """Regular expression of the row that begins a document, where rows are lines and not documents."""
    num_documents: PositiveInteger | None = None
    """Training documents: how many a built-in corpus makes, or how many of another corpus are used. Empty: all."""
    validation_fraction: Annotated[Fraction, Field(gt=0)] = 0.05
    """Share of the documents held out for validation where the corpus has no validation split."""
    seed: NonNegativeInteger = 0
    """Seed of a built-in corpus, and of the choice of the documents that are held out."""
    sliding_window_size: NonNegativeInteger = 8
    """Tokens that a window shares with the window before it in the same document."""

    @field_validator("document_start")
    @classmethod
    def check_pattern(cls, pattern: str | None) -> str | None:
        """A pattern that does not compile would fail only when the corpus is read."""
        try:
            with warnings.catch_warnings(action="ignore"):  # about what later versions of Python may read differently
                re.compile(pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise PydanticCustomError(
                "pattern", "must be a regular expression ({reason})", {"reason": str(error)}
            ) from None
        return pattern


class TrainingConfig(Section):
    """How the model is trained. Every interval is in steps."""

    batch_size: PositiveInteger = 32
    """Windows a step, over all accumulation steps and processes: no result depends on the machine."""
    random_window_offset: Boolean = False
    """Cut the training windows at other places in each epoch, so that a token is seen at many positions."""
    gradient_accumulation_steps: PositiveInteger = 1
    """Parts in which a batch is computed, to save memory. The result stays the same."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes of torchrun train: each with all weights (`ddp`), or with its share of them (`fsdp`)."""
    gather_limit_gb: NonNegativeNumber = 1.0
    """With `fsdp`, a checkpoint of more gigabytes is saved as a folder, a file a process, and is never whole in one."""
    activation_checkpointing: Boolean = False
    """Compute each block again in the backward pass instead of keeping its activations: less memory, more time."""
    rank_timeout: Annotated[Number, Field(ge=1, le=1e6)] = 600.0
    """With several processes: seconds that each one waits for the others, saving included, before the training ends."""
    max_epochs: PositiveInteger = 250
    """Longest training, in passes over the training windows."""
    max_steps: PositiveInteger | None = None
    """Longest training in steps; where it is set, it replaces `max_epochs`."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon` for the blocks' matrices with AdamW for the rest."""
    learning_rate: PositiveNumber = 3e-4
    """Peak learning rate of AdamW."""
    muon_learning_rate: PositiveNumber = 0.02
    """Peak learning rate of Muon, where the optimizer is `muon`."""
    beta1: Fraction = 0.9
    """AdamW's decay of the mean of the gradients."""
    beta2: Fraction = 0.999
    """AdamW's decay of the mean of their squares."""
    weight_decay: NonNegativeNumber = 0.01
    """Decoupled weight decay on matrices and embeddings; the norms' gains have none."""
    muon_weight_decay: NonNegativeNumber | None = None
    """Weight decay of the matrices that Muon moves. Empty: `weight_decay`."""
    ema_decay: Fraction | None = None
    """Decay, in each step, of the average of the weights that is then evaluated and saved as the model. Empty: none."""
    gradient_clip_norm: PositiveNumber | None = 1.0
    """Gradients are scaled down to this norm. Empty: never."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do about an update whose loss or gradients are not finite: `stop`, or `skip` it, ten in a row at most."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The learning rate after the warm-up: down to zero along a cosine or a line, or constant."""
    decay_fraction: Annotated[PositiveNumber, Field(le=1)] = 1.0
    """Share of the steps after the warm-up in which the rate falls, the last ones; before them it is at its peak."""
    warmup_steps: NonNegativeInteger = 500
    """Steps in which the learning rate rises from zero to its peak."""
    patience: PositiveInteger | None = 5
    """Evaluations at the ends of epochs without improvement after which training stops. Empty: never."""
    stopping_threshold: NonNegativeNumber = 1e-4
    """How much lower a validation loss must be, in nats, to count as an improvement."""
    eval_interval: PositiveInteger | None = None
    """Evaluate every so many steps, besides the end of each epoch."""
    log_interval: PositiveInteger = 10
    """Write a line of metrics every so many steps."""
    checkpoint_interval: PositiveInteger | None = 500
    """Save `latest` every so many steps, besides every evaluation."""
    snapshots: Boolean = True
    """Keep the weights at steps 0, 1, 2, 4, ..., 512 and then evenly, as training has them and never averaged."""
    loggers: Annotated[list[Literal["tensorboard", "wandb"]], BeforeValidator(read_names)] = []
    """Where metrics go besides `metrics.jsonl`, in the run's folder: `tensorboard`, `wandb` (Weights & Biases)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; the weights stay float32. `auto` takes what is best for the device."""
    compile: Boolean = False
    """Compile the training step with `torch.compile` (needs a C++ compiler on a CPU)."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$")] = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    seed: Annotated[Integer, Field(ge=0, lt=2**63)] = 0
    """Seed of the weights, the dropout and the order of the windows."""


class RunConfig(Section):
    """Everything that defines a run."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    dataset: DatasetConfig = DatasetConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def check_consistency(self) -> "RunConfig":
        """What no single section can check; the error carries the path of the key to change."""
        if self.dataset.sliding_window_size >= self.model.context_size:
            raise inconsistent(
                "dataset.sliding_window_size",
                f"must be smaller than model.context_size ({self.model.context_size})",
            )
        if self.model.positions == "rotary" and self.model.d_key % 2:
            raise inconsistent("model.d_key", "must be even with rotary positions, which turn pairs of numbers")
        if self.training.batch_size % self.training.gradient_accumulation_steps:
            raise inconsistent(
                "training.gradient_accumulation_steps",
                f"must divide training.batch_size ({self.training.batch_size})",
            )
        return self


def inconsistent(path: str, problem: str) -> PydanticCustomError:
    """An error about the key at `path` that only the whole config shows."""
    return PydanticCustomError("inconsistent", "{problem}", {"path": path, "problem": problem})


def json_schema() -> str:
    """The JSON schema of a config file, as text."""
    schema = RunConfig.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json_schema(), encoding="utf-8")
