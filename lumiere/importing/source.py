"""Where a model comes from: a folder or file of Hugging Face, a name on its Hub, a GGUF file, or a state dict."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lumiere.data.foreign_tokenizer import CONFIG_NAME, ForeignTokenizer, read_config, read_text
from lumiere.data.tokenizer import MAX_BYTES, TOKENIZER_NAME
from lumiere.errors import LumiereError
from lumiere.importing import gguf, huggingface
from lumiere.importing.architectures import CLASSES, LLAMA_NAMES, READERS, rope_parameters
from lumiere.importing.gguf_tokenizer import read_tokenizer
from lumiere.models.transformer import Transformer

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("config.json", "generation_config.json", TOKENIZER_NAME, CONFIG_NAME, "*.safetensors", "*.index.json")
"""What is downloaded: never code, never a pickle."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

Load = Callable[[torch.dtype], nn.Module]


@dataclass(frozen=True)
class Imported:
    """A model from elsewhere, and how to load it in `transformers`.

    Attributes:
        files: Its files, to be recorded with their hashes.
        origin: What the run's record says of the source.
        reference: Loads the same model by its class in `transformers`; None if it has no such class.
    """

    model: Transformer
    tokenizer: ForeignTokenizer
    files: tuple[Path, ...]
    origin: Mapping[str, Any]
    reference: Load | None


def open_source(source: str, revision: str | None = None) -> Imported:
    """Open a model and its tokenizer.

    Args:
        source: A folder, a GGUF or safetensors file, or a Hub name such as `HuggingFaceTB/SmolLM2-135M`.
        revision: Branch, tag or commit on the Hub.

    Raises:
        LumiereError: It does not exist, is damaged, or is a model that Lumiere cannot compute.
    """
    path = Path(source)
    if path.is_dir():
        return open_folder(path)
    if path.suffix in PICKLES and path.exists():
        raise LumiereError(
            f"{source!r} is a pickle, which may run code", "where you trust it, save its tensors as safetensors first"
        )
    if path.suffix == ".safetensors" and path.exists():
        return open_folder(path.parent, path)
    if path.exists():
        return open_gguf(path)
    if not HUB_NAME.fullmatch(source):
        raise LumiereError(
            f"{source!r} does not exist", "give a folder, a GGUF file, or a Hub name such as HuggingFaceTB/SmolLM2-135M"
        )
    folder = downloaded(source, revision)
    found = open_folder(folder)
    return replace(found, origin={**found.origin, "hub": source, "commit": folder.name})


def open_folder(folder: Path, file: Path | None = None) -> Imported:
    """Open a folder with `config.json`, safetensors files (or `file` in their place) and `tokenizer.json`."""
    opened = huggingface.open_folder(folder, file)
    config = read_config(folder / CONFIG_NAME)
    generation = read_config(folder / "generation_config.json")
    text = read_text(folder / TOKENIZER_NAME, MAX_BYTES)
    tokenizer = ForeignTokenizer.parse(text, config, str(folder / TOKENIZER_NAME), generation.get("eos_token_id"))
    names = ("config.json", TOKENIZER_NAME, CONFIG_NAME, "generation_config.json", "model.safetensors.index.json")
    files = (*(folder / name for name in names if (folder / name).exists()), *opened.files)
    kind = "huggingface" if opened.model_type in READERS else "state dict"
    origin = {"format": kind, "model_type": opened.model_type, "dtype": opened.dtype}

    def reference(dtype: torch.dtype) -> nn.Module:
        return transformers_model(opened.model_type, str(folder), dtype)

    has_class = opened.model_type in CLASSES  # Lumiere's own modeling file has none
    return Imported(opened.model, tokenizer, files, origin, reference if has_class else None)


def open_gguf(path: Path) -> Imported:
    """Open a GGUF file."""
    opened = gguf.open_gguf(path)
    tokenizer = read_tokenizer(opened.fields, str(path))
    origin = {"format": "gguf", "model_type": "llama", "quantization": opened.quantization}

    def reference(dtype: torch.dtype) -> nn.Module:
        return llama_of(opened.model, dtype)

    return Imported(opened.model, tokenizer, (path,), origin, reference)


def llama_of(model: Transformer, dtype: torch.dtype) -> nn.Module:
    """Return the model of a GGUF file as `LlamaForCausalLM` (whose own reader of GGUF needs a package more).

    Raises:
        ImportError: `transformers` is not installed.
    """
    import transformers

    settings = model.settings
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=settings.embedding_size,
        intermediate_size=settings.d_ff,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.key_value_heads,
        head_dim=settings.d_key,
        max_position_embeddings=settings.context_size,
        rms_norm_eps=settings.norm_epsilon,
        rope_parameters=rope_parameters(settings),
        tie_word_embeddings=settings.tie_embeddings,
        attention_bias=settings.bias != "none",
        mlp_bias=settings.bias == "all",
    )
    config._attn_implementation = "eager"
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(config)
    weights: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        layer, module = module.split(".", 2)[1:] if module.startswith("blocks.") else ("", module)
        theirs = f"{LLAMA_NAMES[module].format(layer=layer)}.{kind}"
        weights[theirs if module == "output_head" else f"model.{theirs}"] = weight.to(dtype)
    llama.load_state_dict(weights, strict=False, assign=True)
    llama.tie_weights()
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config)
    return llama.eval()


def transformers_model(model_type: str, folder: str, dtype: torch.dtype) -> nn.Module:
    """Load a model by the name of its class: neither `auto_map` nor code beside the weights is ever used.

    Raises:
        ImportError: `transformers` is not installed.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    cls = getattr(transformers, CLASSES[model_type])
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "local_files_only": True}
    return cls.from_pretrained(folder, use_safetensors=True, **options).eval()


def downloaded(name: str, revision: str | None) -> Path:
    """Return the folder of a Hub model's files, downloading what is not in the Hub's cache; it is named by its commit.

    Raises:
        LumiereError: The model does not exist, or the Hub cannot be reached and the cache lacks it.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    from lumiere.data.hub import hub_reachable

    offline = bool(huggingface_hub.constants.HF_HUB_OFFLINE) or not hub_reachable()
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(HUB_FILES), local_files_only=offline
            )
        )
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise LumiereError(f"{name!r} is not on the Hugging Face Hub", "check the name and --revision") from None
    except LocalEntryNotFoundError:
        problem = f"{name!r} is not on this machine, and the Hugging Face Hub cannot be reached"
        raise LumiereError(problem, "download it where there is a network, and give the folder") from None
