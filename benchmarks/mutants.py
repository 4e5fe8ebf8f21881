"""Break each guarantee once and see a test fail: `python benchmarks/mutants.py [--only NAME]`.

Each mutation replaces a text that occurs exactly once in a file of the package, in a copy of the checkout, where the
fast tests of the named files run until the first failure. First they must pass without a mutation. Exits with 1 if a
mutation survives, if its tests end with anything but a failure, or if its text is not found exactly once.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("lumiere", "tests", "configs", "benchmarks", "pyproject.toml")
LIMIT_SECONDS = 900


class Mutation(NamedTuple):
    """A defect.

    Attributes:
        name: The guarantee that it breaks.
        file: In `lumiere/`, without `.py`.
        old, new: The text that is replaced, and its replacement.
        tests: Files in `tests/`, without `.py`, separated by spaces.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


PLACE = "                target = step_folders.place(temporary, stem, disk)\n"
POINT = "                if names:\n                    step_folders.point(folder, names, target, disk)\n"
CLEAR = "                step_folders.clear(folder, disk)\n"
STEPS, STATE, TRAINER = "persistence/test_step_folders", "training/state", "training/trainer"
FOREIGN = "data/test_foreign_tokenizer"
TRANSFER = "persistence/test_transfer"

# fmt: off
MUTATIONS = [Mutation(*row) for row in (
    # Saving and resuming
    ("random-state", STATE, 'torch.set_rng_state(checkpoint.rng["cpu"])', "pass", "training/test_state"),
    ("optimizer-state", STATE, "self.optimizers.load_state_tensors(optimizer)", "pass",
     "training/test_state"),
    ("fsync-file", "files", "            self.fsync(file.fileno())\n", "", STEPS),
    ("fsync-tensors", "files", "        self.sync(path)\n", "", STEPS),
    ("fsync-renamed", "files", "        self.sync(new.parent)\n", "", STEPS),
    ("fsync-folder", "files", "            self.fsync(descriptor)\n", "            pass\n", "persistence/test_atomic"),
    ("fsync-system", "files", "        os.fsync(descriptor)\n", "        pass\n", "persistence/test_atomic"),
    ("pointers-first", "persistence/checkpoint_manager", PLACE + POINT,
     POINT.replace("target", "stem") + PLACE, STEPS),
    ("delete-first", "persistence/checkpoint_manager", PLACE + POINT + CLEAR, PLACE + CLEAR + POINT, STEPS),
    ("checkpoint-hash", "persistence/checkpoint", "if digest != file.sha256:", "if False:",
     "persistence/test_checkpoint"),
    ("tokenizer-of-checkpoint", "persistence/loading", "if saved in (None, tokenizer.fingerprint):", "if True:",
     "cli/test_hostile_runs"),
    ("tokenizer-of-resumed", "training/setup", "if exists and setup.corpus", "if False and setup.corpus",
     "training/test_resume"),
    ("lock-of-start", "training/run", "stack.enter_context(locked(run.path))", "pass", "training/test_extension"),
    ("lock-of-resume", "training/run", "    with locked(run.path):\n        # After", "    if True:\n        # After",
     "training/test_extension"),
    ("prune-best", "persistence/catalog", "for name in names if name not in kept)",
     'for name in names if name not in kept or name == "best")', "persistence/test_removal"),
    # Runs at another place
    ("pull-hash", "persistence/transfer", "if digest.hexdigest() != entry.sha256:", "if False:", TRANSFER),
    ("pull-names", "persistence/listing", "not isinstance(entry.name, str) or not is_known(entry.name)",
     "not isinstance(entry.name, str)", TRANSFER),
    ("place-links", "persistence/places", "if inside.is_symlink():", "if False:", TRANSFER),
    ("push-running", "persistence/transfer", '        if run.status == "running":', "        if False:", TRANSFER),
    ("push-last", "persistence/transfer", '                    place.remove(f"{run}/{LISTING_NAME}")\n', "", TRANSFER),
    ("push-whole-lines", "persistence/transfer", "whole_bytes(path)", "path.stat().st_size", TRANSFER),
    ("credentials", "persistence/places", 'text = text.replace(secret, "***")', "pass", "persistence/test_places"),

    # Data
    ("shuffle-of-epoch", "data/batches", 'key=f"{seed} {epoch}"', 'key=f"{seed}"', "data/test_batches"),
    ("other-shuffle", "data/batches", "0xBF58476D1CE4E5B9", "0xBF58476D1CE4E5BB", "data/test_permutation"),
    ("gguf-pairs", "export/gguf", "(num_heads, 2, -1)).transpose(1, 2)", "(num_heads, 2, -1))", "export/test_gguf"),
    ("stock-settings", "export/stock_classes", "effective(theirs.settings) == effective(model.settings)", "True",
     "export/test_stock_classes"),
    ("stock-biases", "export/stock_classes", " and biased <= with_bias", "", "export/test_stock_classes"),
    ("modeling-windows", "export/modeling_lumiere", "(distances_TS < window)", "(distances_TS <= window)",
     "export/test_hugging_face"),
    ("rotary-pairs", "export/transformer_lens", "neighboring_pairs(value, model.d_key, model.settings.rotary_size)",
     "value", "export/test_transformer_lens"),
    ("rotary-scaling", "components/layers", "periods = periods * stretch(", "stretch(", "models/test_transformer"),
    ("last-position", "data/batches", "        targets[columns < lengths[:, None] - 2] = IGNORED\n", "        pass\n",
     "training/test_loss_positions"),
    ("overlap", "data/batches", "return self.context_size + 1 - self.sliding_window_size",
     "return self.context_size - self.sliding_window_size", "data/test_windows"),
    ("csv-null", "data/tables", 'yield fields[index] if fields else ""',
     'yield fields[index].replace("null", "") if fields else ""', "data/test_tables"),
    ("json-null", "data/tables", 'yield value or ""', "yield str(value)", "data/test_tables"),
    ("byte-order-mark", "data/text", '"utf-8-sig"', '"utf-8"', "data/test_text"),
    ("pickle", "persistence/tensor_files", "from safetensors import SafetensorError, safe_open\n",
     "from safetensors import SafetensorError, safe_open\n\n    __import__('torch').load(path, weights_only=False)\n",
     "test_no_code_in_data"),
    # The model
    ("norm-epsilon", "components/kernels", "mean_square_BT1.add_(added).rsqrt_()", "mean_square_BT1.rsqrt_()",
     "components/test_layers"),
    ("norm-of-values", "components/layers", "self.center(x_BTE).square().mean(-1, keepdim=True)",
     "self.center(x_BTE).mean(-1, keepdim=True).square()", "components/test_layers"),
    ("norm-centered", "components/layers", "x_BTE - x_BTE.mean(-1, keepdim=True) if", "x_BTE if",
     "interpret/test_architectures"),
    ("window", "components/kernels", "positions_BT[..., None] - window)", "positions_BT[..., None] - window - 1)",
     "models/test_transformer"),
    ("grouped-heads", "components/kernels", "x.repeat_interleave(num_heads // x.shape[dim], dim)",
     "x.repeat_interleave(num_heads // x.shape[dim], dim).flip(dim)", "models/test_transformer"),
    ("next-key-masked", "components/kernels", "columns_S > positions_BT[..., None]",
     "columns_S > positions_BT[..., None] + 1", "components/test_kernels"),
    ("next-key-causal", "components/kernels", ".triu(diagonal=1)", ".triu(diagonal=2)", "components/test_kernels"),
    ("softmax-scale", "components/layers", "or settings.d_key**-0.5", "or 1 / settings.d_key",
     "models/test_transformer"),
    ("swiglu", "components/layers", "torch.cat([self.gate.weight, self.up.weight])",
     "torch.cat([self.up.weight, self.gate.weight])", "components/test_layers"),
    # Fine-tuning
    ("weights-of-parent", TRAINER, "if setup.lineage and checkpoint is None:", "if False:",
     "training/test_fine_tuning"),
    ("tokenizer-of-parent", "training/setup",
     "origin.tokenizer if origin else existing_tokenizer(config.tokenizer)", "existing_tokenizer(config.tokenizer)",
     "training/test_fine_tuning"),
    # Models from elsewhere
    ("foreign-truncation", "data/foreign_tokenizer", "        backend.no_truncation()\n", "", FOREIGN),
    ("foreign-special", "data/foreign_tokenizer", "if token in special else [piece, score]",
     "if token in () else [piece, score]", FOREIGN),
    ("foreign-padding", "models/transformer", "PADDING_ID if config.tokenizer.path is None else None", "PADDING_ID",
     "importing/test_importing"),
    ("verified-import", "importing/verification", "if exact <= FLOAT64_TOLERANCE:", "if exact <= 1.0:",
     "importing/test_importing"),
    ("rows-without-token", "persistence/loading", "        model.num_tokens = len(tokenizer)\n", "        pass\n",
     "importing/test_importing"),
    ("bias-of-logits", "importing/state_dicts", "if tensors.pop(name).any():", "if tensors.pop(name) is None:",
     "importing/test_state_dicts"),
    ("rows-once", "interpret/activation_writer", "max(0, windows.sliding_window_size - 1)", "0",
     "interpret/test_activation_dataset"),
    ("shard-hash", "interpret/activation_dataset", "(not verify or hash_file(file) == shard.sha256)", "True",
     "interpret/test_activation_dataset"),
    ("model-of-parent", "config/inheritance", "if is_fixed and read(", "if False and read(", "config/test_inheritance"),
    ("frozen", "training/freezing", "parameters[parameter].requires_grad_(False)", "pass", "training/test_freezing"),
    ("frozen-range", "training/freezing", "range(first, last + 1)", "range(first, max(last, first + 1))",
     "training/test_freezing"),
    ("frozen-state", "training/optim", "if unknown := by_name.keys() - self._parameters.keys():",
     "if unknown := by_name.keys() - by_name.keys():", "training/test_freezing"),
    # Training and evaluation
    ("adamw-decay", "training/optim", '"weight_decay": 0.0}', '"weight_decay": config.weight_decay}',
     "training/test_optim"),
    ("muon-decay", "training/optim", 'parameter.mul_(1 - group["lr"] * group["weight_decay"])', "pass",
     "training/test_optim"),
    ("clipping", TRAINER, "if grad_norm > limit:", "if False:", "training/test_trainer"),
    ("average-evaluated", STATE, "if self.average is None:\n            yield", "if True:\n            yield",
     "training/test_optim"),
    ("warm-up", "training/schedule", "return step / warmup_steps", "return (step - 1) / warmup_steps",
     "training/test_schedule"),
    ("threshold", STATE, "loss < self.stopping_loss - threshold", "loss < self.stopping_loss", "training/test_state"),
    ("patience", TRAINER, ">= self.settings.patience:", "> self.settings.patience:", "training/test_trainer"),
    ("accumulation", TRAINER, "part.targets) / batch.num_targets", "part.targets) / (part.targets >= 0).sum()",
     "training/test_trainer"),
    ("masked-targets", "components/kernels", "chunk.losses * chunk.is_real for chunk", "chunk.losses for chunk",
     "evaluation/test_detailed"),
    ("word-perplexity", "evaluation/loss", "exponential(nats / facts.num_words)", "exponential(loss)",
     "evaluation/test_detailed"),
    ("word-perplexity-of-documents", "evaluation/scoring", "np.exp(nats / totals.num_words)", "np.exp(loss)",
     "evaluation/test_detailed"),
    # Generation
    ("top-p", "generation/sampling", "ascending_BV.softmax(-1).cumsum(-1) <=",
     "(p := ascending_BV.softmax(-1)).cumsum(-1) - p <=", "generation/test_sampling"),
    ("top-p-of-one-row", "generation/sampling", "if kept and rest <=", "if kept and rest - weight <=",
     "generation/test_sampling"),
    ("repetition", "generation/sampling", "logits_BV * self._penalty, logits_BV / self._penalty",
     "logits_BV / self._penalty, logits_BV * self._penalty", "generation/test_sampling"),
    ("cache-position", "components/layers", "slice(self.lengths, self.lengths + len(positions))",
     "slice(max(self.lengths - 1, 0), max(self.lengths - 1, 0) + len(positions))", "generation/test_kv_cache"),
    ("cache-position-of-one-stream", "generation/kv_cache", "step(tokens[0], lengths[0])",
     "step(tokens[0], lengths[0] - 1)", "generation/test_kv_cache"),
    ("hooks-in-a-slid-window", "generation/kv_cache", "elif filled and self._hooks:", "elif False:",
     "generation/test_hooks"),
    ("place-of-a-step", "generation/kv_cache", "first_B1 + torch.arange(num_positions",
     "0 * first_B1 + torch.arange(num_positions", "generation/test_hooks"),
    ("count-of-steering", "generation/steering", "self.num_edits += int(is_steered_BT1.sum())",
     "self.num_edits += is_steered_BT1.numel()", "generation/test_steering"),
    # Interpretability
    ("probe-split", "interpret/probe", "return part[number_n]",
     "return np.random.default_rng(seed).permutation(part[number_n])", "interpret/test_probe"),
    ("placebo-norm", "interpret/steering", "rows * (norm / rows.norm", "rows * (1 / rows.norm",
     "interpret/test_steering"),
    ("lens-norm", "interpret/logit_lens", "unembed(model.final_norm(cache[stage]))", "unembed(cache[stage])",
     "interpret/test_logit_lens"),
    ("mean-ablation", "interpret/ablation", "means.get(layer, 0.0)", "0.0", "interpret/test_ablation"),
    ("parallel-edges", "interpret/edges", "read = before if block.is_parallel else len(writers)", "read = len(writers)",
     "interpret/test_edges"),
    ("edge-norm", "interpret/edge_ablation", "norm.center(read_1MTE[0]) / norm.scale(read_1MTE[0])",
     'norm.center(read_1MTE[0]) / norm.scale(self.streams["post"])', "interpret/test_edge_ablation"),
    ("induction", "interpret/head_scores", "[torch.zeros_like(same_NTS[..., :1]), same_NTS[..., :-1]]",
     "[same_NTS[..., 1:], torch.zeros_like(same_NTS[..., :1])]", "interpret/test_head_scores"),
    ("claims-interval", "interpret/claims", "if low >= self.low and high <= self.high:",
     "if high >= self.low and low <= self.high:", "interpret/test_claims"),
    ("outside-edges", "interpret/stated_circuit", "circuit_N.numpy() == 0", "circuit_N.numpy() == 1",
     "interpret/test_stated_circuit"),
    ("singular-groups", "interpret/head_weights", "<= CLOSE * values[..., 1:]", "<= values[..., 1:]",
     "interpret/test_head_weights"),
    ("head-sums", "interpret/logit_attribution", '(activations[f"{name}attn.hook_z"][positions] * direction_PHV)',
     '(activations[f"{name}attn.hook_v"][positions] * direction_PHV)', "interpret/test_logit_attribution"),
    # The command line
    ("control-characters", "errors", "c if c.isprintable() or c in keep else ascii(c)[1:-1]", "c", "test_files"),
    ("exit-code", "cli/usage", "isinstance(error, FailedCheckError) else 2",
     "isinstance(error, FailedCheckError) else 1", "cli/test_bad_input"),
)]
# fmt: on


def copy_checkout(folder: Path) -> None:
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)


def run_tests(folder: Path, tests: Iterable[str]) -> tuple[int, str]:
    """Return pytest's exit code, or 124 after `LIMIT_SECONDS`, and its output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", *(f"tests/{test}.py" for test in tests)]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, ""
    return result.returncode, result.stdout + result.stderr


def outcome(mutation: Mutation) -> str:
    """Return `caught by TEST`, or what went wrong instead."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_checkout(folder)
        path = folder / "lumiere" / f"{mutation.file}.py"
        text = path.read_text(encoding="utf-8")
        if (count := text.count(mutation.old)) != 1:
            return f"INVALID: its text occurs {count} times in lumiere/{mutation.file}.py"
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        code, output = run_tests(folder, mutation.tests.split())
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", output, re.MULTILINE)
    if code == 1 and failed:
        return f"caught by {failed[1]}"
    return "SURVIVED" if code == 0 else f"ERROR: pytest ended with {code}\n{output[-2000:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="NAME", choices=[mutation.name for mutation in MUTATIONS])
    only = parser.parse_args().only
    chosen = [mutation for mutation in MUTATIONS if only in (None, mutation.name)]
    with tempfile.TemporaryDirectory() as name:
        copy_checkout(Path(name))
        code, output = run_tests(Path(name), sorted({test for mutation in chosen for test in mutation.tests.split()}))
    if code:
        raise SystemExit(f"the tests fail without a mutation:\n{output[-2000:]}")
    num_caught = 0
    for mutation in chosen:
        found = outcome(mutation)
        num_caught += found.startswith("caught")
        print(f"{mutation.name:30}{found}", flush=True)
    print(f"{num_caught} of {len(chosen)} caught")
    sys.exit(num_caught < len(chosen))


if __name__ == "__main__":
    main()
