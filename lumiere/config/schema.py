"""The settings of a run: names, descriptions, defaults (those of the original Lumière model card) and limits.

Values are read strictly. YAML and `--set` deliver text, and plain pydantic would read `012` as 12 and `yes` as True;
here a boolean is never a number, and text counts only where it spells a value of the setting's type.

`python -m lumiere.config.schema configs/schema.json` writes the JSON schema, from which editors complete keys.
"""

import contextlib
import json
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lumiere.files import MAX_INTEGER

# Leading zeros are rejected: some readers take 012 for octal. No two parts of the pattern match the same characters, so
# that a long text fails in linear time.
NUMBER = re.compile(r"[+-]?((?:0|[1-9][0-9_]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def read_number(value: Any) -> float:
    """Read a finite float.

    Raises:
        PydanticCustomError: `value` is a boolean, NaN, infinite, or text that spells no number.
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
    """Read a whole number: `2e3` counts, `2.5` does not."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        number = read_number(value)
    except PydanticCustomError:
        number = math.nan
    if not number.is_integer():
        raise PydanticCustomError("integer", "must be a whole number")
    # Parse digits as an integer: a float is exact only up to 2^53.
    text = str(value).strip().replace("_", "")
    return int(text) if text.lstrip("+-").isdigit() else int(number)


def read_boolean(value: Any) -> bool:
    """Read `true` or `false`, in any case."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise PydanticCustomError("boolean", "must be true or false")
    return value


def read_names(value: Any) -> Any:
    """Read a list of names; `a, b` is one too, which is easier to write in a shell."""
    if value is None:
        return []
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def read_list(value: Any) -> Any:
    """Read a list; `a, b` is one too, and `none` in it is null."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list):
        return items
    return [None if isinstance(item, str) and item.strip() in ("none", "null") else item for item in items]


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


def inconsistent(path: str, problem: str) -> PydanticCustomError:
    """Return the error of a setting that contradicts another."""
    return PydanticCustomError("inconsistent", "must be {problem}", {"path": path, "problem": problem})


class Section(BaseModel):
    """A frozen section that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def read_none(cls, values: Any) -> Any:
        """Read the text `none` as null where a setting may be null."""
        if not isinstance(values, dict):
            return values
        nullable = {name for name, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        return {key: None if key in nullable and value == "none" else value for key, value in values.items()}


class RotaryScaling(Section):
    """How rotary positions turn more slowly, for contexts longer than those that a model was first trained on."""

    type: Literal["linear", "llama3"]
    """`linear` divides all frequencies by `factor`; `llama3` those of long wavelengths only."""
    factor: Annotated[Number, Field(ge=1)]
    """By how much frequencies are divided."""
    original_context_size: Width | None = None
    """`llama3`: context of the first training; wavelengths are compared with it."""
    low_frequency_factor: PositiveNumber = 1.0
    """`llama3`: wavelengths above `original_context_size` divided by this are scaled whole."""
    high_frequency_factor: PositiveNumber = 4.0
    """`llama3`: wavelengths below `original_context_size` divided by this are not scaled."""

    @model_validator(mode="after")
    def check_bands(self) -> "RotaryScaling":
        """Check that `llama3` has what it compares wavelengths with."""
        if self.type == "llama3" and self.original_context_size is None:
            raise inconsistent("model.rotary_scaling", "given an original_context_size with type llama3")
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise inconsistent("model.rotary_scaling", "given a high_frequency_factor above its low_frequency_factor")
        return self


class ModelConfig(Section):
    """Shape of the transformer."""

    embedding_size: Width = 128
    """Width of the residual stream."""
    context_size: Width = 64
    """Maximum sequence length in tokens."""
    num_layers: Count = 4
    """Number of transformer blocks."""
    num_heads: Count = 4
    """Attention heads per block."""
    d_key: Width = 32
    """Width of each head's queries and keys."""
    d_value: Width = 32
    """Width of each head's values."""
    d_ff: Width = 256
    """Hidden width of the feed-forward layer."""
    dropout: Fraction = 0.1
    """Dropout rate during training, after the embeddings and after each attention and feed-forward layer."""
    norm: Literal["rms", "layer", "layer_plain", "none"] = "rms"
    """Norm before each layer and the output: `rms`, `layer` (gain and bias), `layer_plain` (no parameters), `none`."""
    norm_epsilon: Annotated[PositiveNumber, Field(le=1)] = 1e-6
    """Added to the mean square or variance before the root."""
    feedforward: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu", "none"] = "swiglu"
    """Feed-forward layer: gated (`swiglu`, `geglu`), plain (`gelu`, `gelu_tanh`, `relu`), or `none`: attention only."""
    positions: Literal["learned", "rotary", "sinusoidal", "none"] = "learned"
    """Position encoding: `learned` embeddings, `rotary` as in Llama, `sinusoidal`, or `none`."""
    rotary_base: Annotated[Number, Field(gt=1)] = 10_000.0
    """Base of the wavelengths of rotary positions."""
    rotary_fraction: Annotated[PositiveNumber, Field(le=1)] = 1.0
    """Fraction of each head, from its first number on, that rotary positions rotate."""
    rotary_scaling: RotaryScaling | None = None
    """Slower rotary positions for longer contexts: `{type: linear, factor: 4}` or `{type: llama3, ...}`, or null."""
    attention_windows: Annotated[list[PositiveInteger | None], BeforeValidator(read_list)] | None = None
    """Tokens that each layer attends to, its own included, as a list with one number per layer; null: all of them."""
    attention_scale: PositiveNumber | None = None
    """Factor of the attention scores. Null: 1 / sqrt(d_key)."""
    num_key_value_heads: Count | None = None
    """Heads of keys and values; each serves an equal number of query heads. Null: one per query head."""
    bias: Literal["none", "qkv", "all"] = "none"
    """Biases: of queries, keys and values (`qkv`), or also of the attention output and feed-forward layer (`all`)."""
    tie_embeddings: Boolean = True
    """Use the token embedding as the output head."""
    parallel_blocks: Boolean = False
    """Let attention and feed-forward read the same residual stream, each through its own norm, as in GPT-NeoX."""
    query_key_norm: Boolean = False
    """Apply an RMSNorm to each query and key before any rotation, with one gain for all heads, as in Qwen3."""
    zero_output_init: Boolean = False
    """Initialize the output projections of attention and feed-forward to zero: every block starts as the identity."""

    @property
    def key_value_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_key_value_heads or self.num_heads

    @property
    def rotary_size(self) -> int:
        """How many numbers of each query and key rotary positions rotate; 0 with other positions."""
        return round(self.d_key * self.rotary_fraction) if self.positions == "rotary" else 0

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer multiplies two branches."""
        return self.feedforward in ("swiglu", "geglu")

    @model_validator(mode="after")
    def check_shape(self) -> "ModelConfig":
        """Check the settings against each other; the error names the key to change."""
        windows = self.attention_windows
        if self.positions == "rotary" and self.rotary_fraction == 1 and self.d_key % 2:
            raise inconsistent("model.d_key", "even with rotary positions, which rotate pairs of numbers")
        if self.positions == "rotary" and (self.rotary_size % 2 or not self.rotary_size):
            problem = f"such that it rotates an even number of the {self.d_key} numbers of a head (model.d_key)"
            raise inconsistent("model.rotary_fraction", problem)
        if self.num_heads % self.key_value_heads:
            raise inconsistent("model.num_key_value_heads", f"a divisor of model.num_heads ({self.num_heads})")
        if windows is not None and len(windows) != self.num_layers:
            problem = f"a list of {self.num_layers} numbers (model.num_layers), not {len(windows)}"
            raise inconsistent("model.attention_windows", problem)
        return self


MIN_VOCAB_SIZE = 259
"""3 special tokens and 256 bytes."""


class TokenizerConfig(Section):
    """Byte-level BPE tokenizer, trained on the training split, or an existing one."""

    path: str | None = None
    """Existing tokenizer to use instead: a `tokenizer.json`, or a folder that has one. Null: train one."""
    vocab_size: Annotated[PositiveInteger, Field(le=2**31)] = 4096
    """Rows of the embedding: 3 special tokens, 256 bytes, and the merges. With `path`, by default its tokens."""
    min_frequency: PositiveInteger = 2
    """Minimum number of occurrences of a pair to be merged."""
    sample_bytes: PositiveInteger = 100_000_000
    """Bytes of text from which merges are learned: the first documents of the training split."""
    normalizer: Literal["nfkc", "nfc", "none"] = "nfkc"
    """Unicode normalization of all text. `nfkc` turns `x²` into `x2`; use `nfc` or `none` for code."""

    @model_validator(mode="after")
    def check_size(self) -> Self:
        if self.path is None and self.vocab_size < MIN_VOCAB_SIZE:
            raise inconsistent("tokenizer.vocab_size", f"at least {MIN_VOCAB_SIZE}, got {self.vocab_size}")
        return self


class DatasetConfig(Section):
    """The corpus, and how documents are cut into windows."""

    name: Annotated[str, Field(min_length=1)] = "stories"
    """`stories` or `chains` (built in), a Hub name, a local folder, or a format: text, json, csv, parquet, arrow."""
    subset: str | None = None
    """Subset of the dataset (its configuration name on the Hub), such as `wikitext-2-raw-v1`."""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """Files of a format: a file, folder or glob pattern, a list of them, or a mapping from splits to them."""
    data_sha256: str | None = None
    """Hash of the local files, recorded by each run. Files with other contents are rejected."""
    text_column: Annotated[str, Field(min_length=1)] = "text"
    """Column that holds the text; `doc.text` is the field `text` nested in `doc`."""
    streaming: Boolean = False
    """Read rows on demand instead of downloading the whole dataset first."""
    document_start: str | None = None
    """Regular expression of the rows that start a document, for datasets whose rows are lines."""
    num_documents: PositiveInteger | None = None
    """Number of training documents to generate (built-in corpora) or to read. Null: 20,000, or all."""
    validation_fraction: Annotated[Fraction, Field(gt=0)] = 0.05
    """Fraction of the documents held out for validation if the corpus has no validation split."""
    seed: NonNegativeInteger = 0
    """Seed of a built-in corpus and of the validation split."""
    sliding_window_size: NonNegativeInteger = 8
    """Tokens shared by consecutive windows of a document."""

    @field_validator("document_start")
    @classmethod
    def check_pattern(cls, pattern: str | None) -> str | None:
        """Compile the pattern now; otherwise it would fail only when the corpus is read."""
        try:
            with warnings.catch_warnings(action="ignore"):  # about syntax that later versions of Python may change
                re.compile(pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            message = "must be a regular expression ({reason})"
            raise PydanticCustomError("pattern", message, {"reason": str(error)}) from None
        return pattern


class TrainingConfig(Section):
    """How the model is trained. All intervals are in steps."""

    batch_size: PositiveInteger = 32
    """Windows per step, over all accumulation steps and processes: results do not depend on the machine."""
    random_window_offset: Boolean = False
    """Shift the training windows by a random offset each epoch, so that tokens appear at many positions."""
    loss_positions: Literal["all", "last"] = "all"
    """Tokens that are predicted: `all`, or the `last` of each document's text, such as the answer of a sum."""
    gradient_accumulation_steps: PositiveInteger = 1
    """Micro-batches per step. More of them take less memory; the result stays the same."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Parallelism under torchrun: `ddp` replicates the weights, `fsdp` shards them."""
    gather_limit_gb: NonNegativeNumber = 1.0
    """With `fsdp`: larger checkpoints are saved in shards, one file per process, and never gathered."""
    activation_checkpointing: Boolean = False
    """Recompute the activations of each block in the backward pass: less memory, more time."""
    rank_timeout: Annotated[Number, Field(ge=1, le=1e6)] = 600.0
    """With several processes: seconds to wait for the others, saving included, before training ends."""
    max_epochs: PositiveInteger = 250
    """Maximum number of passes over the training windows."""
    max_steps: PositiveInteger | None = None
    """Maximum number of steps. Overrides `max_epochs`."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon` for the matrices of the blocks with AdamW for all other weights."""
    learning_rate: PositiveNumber = 3e-4
    """Peak learning rate of AdamW."""
    muon_learning_rate: PositiveNumber = 0.02
    """Peak learning rate of Muon, if `optimizer` is `muon`."""
    beta1: Fraction = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: Fraction = 0.999
    """AdamW's decay rate of the second moment."""
    weight_decay: NonNegativeNumber = 0.01
    """Decoupled weight decay of matrices and embeddings; norm gains have none."""
    muon_weight_decay: NonNegativeNumber | None = None
    """Weight decay of the matrices that Muon updates. Null: `weight_decay`."""
    ema_decay: Fraction | None = None
    """Decay per step of the EMA of the weights, which is what gets evaluated and saved. Null: no EMA."""
    freeze: Annotated[list[str], BeforeValidator(read_names)] = []
    """Parts that are not trained: `embeddings`, `positions`, `blocks.0-3`, `blocks.2.attention`, `final_norm`, ..."""
    gradient_clip_norm: PositiveNumber | None = 1.0
    """Maximum gradient norm; larger gradients are scaled down. Null: no clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On NaN or infinity in loss or gradients: `stop`, or `skip` the step, at most ten in a row."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after warm-up: `cosine` or `linear` decay to zero, or `constant`."""
    decay_fraction: Annotated[PositiveNumber, Field(le=1)] = 1.0
    """Fraction of the steps after warm-up over which the rate decays; it stays at its peak before."""
    warmup_steps: NonNegativeInteger = 500
    """Steps over which the learning rate rises linearly from zero to its peak."""
    patience: PositiveInteger | None = 5
    """Stop after this many end-of-epoch evaluations without improvement. Null: never."""
    stopping_threshold: NonNegativeNumber = 1e-4
    """Minimum decrease of the validation loss, in nats, that counts as an improvement."""
    eval_interval: PositiveInteger | None = None
    """Steps between evaluations, in addition to those at the end of each epoch."""
    log_interval: PositiveInteger = 10
    """Steps between lines of training metrics."""
    checkpoint_interval: PositiveInteger | None = 500
    """Steps between saves of `latest`, in addition to those after each evaluation."""
    snapshots: Boolean = True
    """Keep the raw weights (never the EMA) of steps 0, 1, 2, 4, ..., 512 and of evenly spaced later steps."""
    loggers: Annotated[list[Literal["tensorboard", "wandb", "trackio"]], BeforeValidator(read_names)] = []
    """Where to log metrics in addition to `metrics.jsonl`: `tensorboard`, `wandb` (Weights & Biases), `trackio`."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; weights stay in float32. `auto` picks the best for the device."""
    compile: Boolean = False
    """Compile the training step with `torch.compile`; on a CPU this needs a C++ compiler."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$")] = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    seed: Annotated[Integer, Field(ge=0, lt=2**63)] = 0
    """Seed of weight initialization, dropout and data order."""


class RunConfig(Section):
    """Everything that defines a run."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    dataset: DatasetConfig = DatasetConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def check_consistency(self) -> "RunConfig":
        """Check settings of several sections against each other; the error names the key to change."""
        model, dataset, training = self.model, self.dataset, self.training
        if dataset.sliding_window_size >= model.context_size:
            problem = f"smaller than model.context_size ({model.context_size})"
            raise inconsistent("dataset.sliding_window_size", problem)
        if training.batch_size % training.gradient_accumulation_steps:
            problem = f"a divisor of training.batch_size ({training.batch_size})"
            raise inconsistent("training.gradient_accumulation_steps", problem)
        if training.random_window_offset and training.loss_positions == "last":
            problem = "false with training.loss_positions last, whose windows end where the text ends"
            raise inconsistent("training.random_window_offset", problem)
        return self


def json_schema() -> str:
    """Return the JSON schema of a config file as text."""
    schema = RunConfig.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json_schema(), encoding="utf-8")
