"""Lenses that are fitted to a model: the tuned lens and the Jacobian lens, and how well they read its streams.

Shapes: B text, T position, N token that is read, R stage of the residual stream (the last one has no translation), E
embedding_size, Vocab vocab_size.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumiere.components.hooks import hooked
from lumiere.components.short_repr import ShortRepr
from lumiere.interpret.result import Receipt, Result, rounding, table
from lumiere.models.transformer import Transformer

TRAINED = ("tuned", "jacobian")
TOKENS_PER_STEP, STEPS, LEARNING_RATE = 2048, 250, 1e-2
MAX_LOGITS = 2**21
"""Logits of one stage at once; where the vocabulary is large, a step reads fewer of its positions."""
EVALUATIONS, PATIENCE = 10, 2
"""How often the held-out divergence is measured, and after how many without an improvement training ends."""
SKIPPED = 16
"""First positions that a Jacobian leaves out, since attention often rests there; a quarter of shorter texts."""
TEXTS_AT_ONCE = 8

Progress = Callable[[int, int], None]
"""Called with the number of steps done, and of all."""


def no_progress(done: int, total: int) -> None: ...


@dataclass(frozen=True, eq=False, repr=False)
class Lens(ShortRepr):
    """A translation of each stage of the residual stream but the last to what the last would be.

    Attributes:
        kind: `tuned` or `bias` (`h + h A + b`), or `jacobian` (`h J^T`).
        matrices: (R - 1, E, E) A, or J with the output first; zero for `bias`.
        offsets: (R - 1, E) b; zero for `jacobian`.
    """

    kind: str
    matrices: Tensor
    offsets: Tensor

    def translate(self, stage: int, resid_BTE: Tensor) -> Tensor:
        """Return the stream of a stage, an index from the embeddings on, as if it were the last one's."""
        if stage == len(self.matrices):
            return resid_BTE
        matrix, offset = self.matrices[stage].to(resid_BTE), self.offsets[stage].to(resid_BTE)
        if self.kind == "jacobian":
            return resid_BTE @ matrix.T
        return resid_BTE + (resid_BTE @ matrix + offset)


def stage_names(model: Transformer, sublayers: bool) -> list[str]:
    """Return the hook points of the residual stream, in the order of the computation."""
    has_mid = sublayers and model.blocks[0].hook_resid_mid is not None
    parts = ("mid", "post") if has_mid else ("post",)
    return [
        "blocks.0.hook_resid_pre",
        *(f"blocks.{layer}.hook_resid_{part}" for layer in range(model.num_layers) for part in parts),
    ]


def plain_lens(model: Transformer, kind: str = "tuned") -> Lens:
    """Return the lens that translates nothing: the logit lens, from which a tuned lens starts."""
    like, size, count = model.token_embedding.weight, model.embedding_size, model.num_layers
    return Lens(kind, like.new_zeros(count, size, size), like.new_zeros(count, size))


@dataclass(frozen=True)
class TunedLens:
    """A trained lens, and its training.

    Attributes:
        lens: the one with the smallest held-out divergence, a mean over the stages.
        bias: as good a lens with offsets alone.
        steps: of the training, until the held-out divergence stopped to fall.
        curve: (steps, held-out divergence of `lens`, of `bias`) at each evaluation, in nats.
    """

    lens: Lens
    bias: Lens
    steps: int
    curve: tuple[tuple[int, float, float], ...]


def train_tuned(
    model: Transformer,
    texts_NT: Tensor,
    held_out_NT: Tensor,
    steps: int = STEPS,
    seed: int = 0,
    learning_rate: float = LEARNING_RATE,
    progress: Progress = no_progress,
) -> TunedLens:
    """Train a tuned lens (Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens").

    Minimizes KL(p_L || p_lens), mean over tokens, of each stage, for `lens(h) = logits(h + h A + b)` with the model's
    own final norm and output head, by Adam with a cosine schedule, all stages from one forward pass. A and b are zero
    at first, so that step 0 is the logit lens. The model does not change. A lens with b alone is trained beside it.

    Args:
        texts_NT: token ids without padding.
        held_out_NT: other texts; training ends when their divergence no longer falls, and keeps the best.
        steps: at most; each reads about 2,048 tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    full, bias = plain_lens(model, "tuned"), plain_lens(model, "bias")
    trained = [full.matrices, full.offsets, bias.offsets]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    best, curve, worse, step = math.inf, [], 0, 0
    kept = [weight.clone() for weight in trained]
    every = max(1, steps // EVALUATIONS)
    num_rows = max(1, TOKENS_PER_STEP // texts_NT.shape[1])
    while True:
        if step % every == 0 or step == steps:
            of_full, of_bias = (float(statistics(model, held_out_NT, lens)[0][:-1].mean()) for lens in (full, bias))
            curve.append((step, of_full, of_bias))
            worse = 0 if of_full < best else worse + 1
            if of_full < best:
                best, kept = of_full, [weight.clone() for weight in trained]
            if worse == PATIENCE or step == steps:
                break
        rows = torch.randint(len(texts_NT), (num_rows,), generator=generator)
        set_gradients(model, texts_NT[rows], full, bias, generator)
        optimizer.step()
        schedule.step()
        step += 1
        progress(step, steps)
    matrices, offsets, bias_offsets = kept
    found = Lens("tuned", matrices, offsets), Lens("bias", torch.zeros_like(matrices), bias_offsets)
    return TunedLens(*found, step, tuple(curve))


def set_gradients(model: Transformer, tokens_BT: Tensor, full: Lens, bias: Lens, generator: torch.Generator) -> None:
    """Set the gradients of the lenses' own tensors, one stage at a time, and of nothing of the model."""
    streams = read_streams(model, tokens_BT)
    count = min(tokens_BT.numel(), max(1, MAX_LOGITS // model.vocab_size))
    chosen_N = torch.randperm(tokens_BT.numel(), generator=generator)[:count]
    read = [stream.flatten(0, 1)[chosen_N] for stream in streams]
    with torch.no_grad():
        final_NV = model.unembed(model.final_norm(read[-1])).softmax(-1)
    for weight in (full.matrices, full.offsets, bias.offsets):
        weight.grad = torch.zeros_like(weight)
    for stage, resid_NE in enumerate(read[:-1]):
        for weights in ((full.matrices, full.offsets), (bias.offsets,)):
            leaves = [weight[stage].detach().requires_grad_() for weight in weights]
            with torch.enable_grad():
                moved_NE = resid_NE + leaves[-1] + (resid_NE @ leaves[0] if len(leaves) == 2 else 0.0)
                logits_NV = model.unembed(model.final_norm(moved_NE))
            # The gradient of the mean divergence in the logits, without the many operations of its computation.
            slope_NV = (logits_NV.detach().softmax(-1) - final_NV) / count
            for weight, gradient in zip(weights, torch.autograd.grad(logits_NV, leaves, slope_NV), strict=True):
                assert weight.grad is not None
                weight.grad[stage] = gradient


def divergence(final_NV: Tensor, read_NV: Tensor) -> Tensor:
    """Return KL(final || read), (N,), of log-probabilities."""
    return (final_NV.exp() * (final_NV - read_NV)).sum(-1)


@torch.no_grad()
def read_streams(model: Transformer, tokens_BT: Tensor) -> list[Tensor]:
    """Return the residual stream of each stage, (B, T, E)."""
    names = stage_names(model, sublayers=False)
    cache: dict[str, Tensor] = {}
    with hooked(model, {name: lambda x, name=name: cache.update({name: x}) for name in names}):
        model.final_residual(tokens_BT)
    return [cache[name] for name in names]


def jacobian_lens(model: Transformer, texts_NT: Tensor, progress: Progress = no_progress) -> Lens:
    """Average how each stage moves the last one: the Jacobian lens.

    Gurnee et al. 2026, "Verbalizable Representations Form a Global Workspace in Language Models". Of each text,
    `J = (1/|P|) sum over t in P of the sum over t' >= t in P of d r_L[t'] / d r[t]`, with the output first; r_L is the
    stream before the final norm, and P leaves out the first `min(16, T / 4)` positions and the last one. Texts count
    equally. A backward pass for each coordinate of r_L, from all positions of P at once, gives a row: by causality,
    only later positions depend on t. The variant with t' = t alone gives other matrices.

    Args:
        texts_NT: token ids without padding.
    """
    total = jacobians(model, texts_NT, progress)[:-1]
    like = model.token_embedding.weight
    return Lens("jacobian", total.to(like), like.new_zeros(total.shape[:2]))


def jacobians(model: Transformer, texts_NT: Tensor, progress: Progress = no_progress) -> Tensor:
    """Return J of every stage, the last one's being the identity, (R, E, E), in float64."""
    names, size = stage_names(model, sublayers=False), model.embedding_size
    places = read_positions(texts_NT.shape[1])
    total_REE = torch.zeros(len(names), size, size, dtype=torch.float64)
    parts = texts_NT.split(TEXTS_AT_ONCE)
    for number, tokens_BT in enumerate(parts):
        cache: dict[str, Tensor] = {}

        def keep(name: str, resid_BTE: Tensor, cache: dict[str, Tensor] = cache) -> Tensor:
            # A leaf before the first block: a model whose weights are frozen has a gradient too.
            cache[name] = resid_BTE if cache else resid_BTE.detach().requires_grad_()
            return cache[name]

        with torch.enable_grad(), hooked(model, {name: lambda x, name=name: keep(name, x) for name in names}):
            model.final_residual(tokens_BT)
        streams = [cache[name] for name in names]
        for row in range(size):
            found = torch.autograd.grad(
                streams[-1][:, places, row].sum(), streams, retain_graph=row + 1 < size, materialize_grads=True
            )
            for stage, gradient_BTE in enumerate(found):
                total_REE[stage, row] += gradient_BTE[:, places].sum((0, 1)).cpu().double()
            progress(number * size + row + 1, len(parts) * size)
    return total_REE / (len(places) * len(texts_NT))


def read_positions(num_positions: int) -> range:
    """Return the positions that a Jacobian averages over."""
    return range(min(SKIPPED, num_positions // 4), num_positions - 1)


@dataclass(frozen=True, kw_only=True)
class LensComparison(Result):
    """How well lenses read the streams of held-out text, at each stage. Means over tokens.

    Attributes:
        lenses: (K,) `logit`, and those that were fitted.
        stages: (R,) hook points; the last gives the model's own prediction with each lens.
        num_tokens: that were read.
        divergences: (K, R) KL(final || lens) in nats.
        agreements: (K, R) how often the lens's most probable token is the model's.
        ranks: (K, R) how many tokens the lens holds to be more probable than the model's most probable one.
    """

    lenses: tuple[str, ...]
    stages: tuple[str, ...]
    num_tokens: int
    divergences: np.ndarray
    agreements: np.ndarray
    ranks: np.ndarray
    DISCRETE = frozenset({"agreements", "ranks"})

    def rows(self) -> Iterator[Mapping[str, Any]]:
        return table(
            {"lens": self.lenses, "stage": self.stages},
            divergence=self.divergences,
            agreement=self.agreements,
            rank=self.ranks,
        )


def compare_lenses(model: Transformer, texts_NT: Tensor, lenses: Mapping[str, Lens]) -> LensComparison:
    """Compare lenses with the logit lens on texts that they were not fitted to.

    Args:
        texts_NT: token ids without padding.
        lenses: by name.
    """
    compared = {"logit": plain_lens(model), **lenses}
    found = np.stack([statistics(model, texts_NT, lens) for lens in compared.values()])  # (K, 3, R)
    divergences_KR = found[:, 0]
    means = dict(zip(compared, divergences_KR[:, :-1].mean(-1).tolist(), strict=True))
    excess = [means[name] - means["logit"] for name, lens in lenses.items() if lens.kind == "tuned"]
    receipts = [
        Receipt("the last stage is the model's prediction", float(np.abs(divergences_KR[:, -1]).max()), rounding(model))
    ]
    if excess:
        receipts.append(Receipt("a tuned lens is no worse than the logit lens", max(0.0, *excess), 0.0))
    return LensComparison(
        lenses=tuple(compared),
        stages=tuple(stage_names(model, sublayers=False)),
        num_tokens=texts_NT.numel(),
        divergences=divergences_KR,
        agreements=found[:, 1],
        ranks=found[:, 2],
        receipts=tuple(receipts),
    )


@torch.no_grad()
def statistics(model: Transformer, texts_NT: Tensor, lens: Lens) -> np.ndarray:
    """Return (3, R): the mean divergence, agreement and rank of each stage."""
    sums = np.zeros((3, model.num_layers + 1))
    at_once = max(1, MAX_LOGITS // (model.vocab_size * texts_NT.shape[1]))
    for tokens_BT in texts_NT.split(at_once):
        streams = read_streams(model, tokens_BT)
        final_BTV = model.unembed(model.final_norm(streams[-1])).log_softmax(-1)
        top_BT1 = final_BTV.argmax(-1, keepdim=True)
        for stage, resid_BTE in enumerate(streams):
            read_BTV = model.unembed(model.final_norm(lens.translate(stage, resid_BTE))).log_softmax(-1)
            rank_BT = (read_BTV > read_BTV.gather(-1, top_BT1)).sum(-1)
            found = divergence(final_BTV, read_BTV), rank_BT == 0, rank_BT
            sums[:, stage] += [float(values.double().sum()) for values in found]
    return sums / texts_NT.numel()
