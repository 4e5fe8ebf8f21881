"""Activation patching: put an activation of one run into another, and see how much of the difference comes along.

Shapes: B pair of prompts (with noise: of each draw), T position, S source position, E embedding_size, G head of keys
and values, K d_key, V d_value, L layer, U unit, P patched position, N cells of one forward pass, R = N * B rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumiere.components.hooks import hook_points, hooked, run_with_gradients
from lumiere.components.layers import KVCache, feedforward_of
from lumiere.errors import LumiereError, check_choice
from lumiere.interpret.bootstrap import ratio_interval
from lumiere.interpret.metrics import Metric, default_metric, find_metric
from lumiere.interpret.prompts import PromptPairs
from lumiere.interpret.result import Receipt, Result, float64, relative_error, rounding, selected, table
from lumiere.models.transformer import Transformer


@dataclass(frozen=True)
class Site:
    """A kind of activation that can be patched.

    Attributes:
        hook: its name, without `blocks.<layer>.`: (B, T, E), or with an axis of units.
        unit: one letter for its units: H heads, N neurons; empty: it has none.
        unit_axis, position_axis: of the activation.
    """

    hook: str
    unit: str = ""
    unit_axis: int = 2
    position_axis: int = 1

    def place(self, unit: int | None, positions: slice) -> tuple[slice | int, ...]:
        """Return where one unit (None: all) is at some positions."""
        place: list[slice | int] = [slice(None)] * (max(self.unit_axis, self.position_axis) + 1)
        place[self.position_axis] = positions
        if unit is not None:
            place[self.unit_axis] = unit
        return tuple(place)

    def count(self, model: Transformer) -> int:
        """Return the number of units in a layer.

        Raises:
            LumiereError: The model has no such activation.
        """
        if self.hook in ("hook_mlp_out", "mlp.hook_post"):
            feedforward_of(model.blocks[0])
        if self.hook == "hook_resid_mid" and model.blocks[0].hook_resid_mid is None:
            raise LumiereError(
                "this model has no resid_mid: no part reads the stream between attention and the end of a block",
                "take resid_pre or resid_post",
            )
        heads = model.settings.key_value_heads if self.hook in ("attn.hook_k", "attn.hook_v") else model.num_heads
        return {"H": heads, "N": model.d_ff}.get(self.unit, 1)


SITES: Mapping[str, Site] = {
    **{name: Site(f"hook_{name}") for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")},
    **{name: Site(f"attn.hook_{name}", "H") for name in "qkvz"},
    "pattern": Site("attn.hook_pattern", "H", unit_axis=1, position_axis=2),
    "neurons": Site("mlp.hook_post", "N"),
}
KINDS = ("denoising", "noising", "tracing")
BY = ("layer", "position", "unit", "both")
DRAWS, NOISE = 10, 3.0
"""Of causal tracing: how often noise is drawn, and its size in standard deviations of the token embedding."""
TOKENS_AT_ONCE = 4096
"""Of one forward pass."""
MAX_RECEIPT_CELLS = 8
PRECISION = 1e4
"""How many times as large as the rounding of a logit the difference between both runs must be."""


@dataclass(frozen=True)
class Recorded:
    """What is kept of a run.

    Attributes:
        streams: (B, T, E) before each block.
        keys, values: (B, G, T, K) and (B, G, T, V) of each layer.
        at_site: the activation of each layer that is patched.
        logits: (B, Vocab) at the read positions.
    """

    streams: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    at_site: dict[int, Tensor]
    logits: Tensor


Cell = tuple[int, int | None, int | None]
"""A layer, a unit or all of them, a position or all of them."""


class Patcher:
    """Runs the model on `base` with activations of `source` in it, many cells in one forward pass.

    The layers before a cell are taken from the recorded stream, and the positions before it from recorded keys and
    values: neither can notice the patch.

    Args:
        pairs: With one row for each row of both tokens.
        noise: (B, T, E) what is added to the token embeddings of the base run.
    """

    def __init__(
        self,
        model: Transformer,
        pairs: PromptPairs,
        site: Site,
        base: Tensor,
        source: Tensor,
        layers: Sequence[int],
        noise: Tensor | None = None,
    ) -> None:
        self.model, self.pairs, self.site, self.noise = model, pairs, site, noise
        self.own_pairs = pairs.to(torch.device("cpu"))
        self.points = hook_points(model)
        # No later position has an effect where the predictions are read.
        self.end = int(pairs.positions.max()) + 1
        self.first = pairs.first_changed
        self.base_tokens, self.source_tokens = base[:, : self.end], source[:, : self.end]
        self.base = self._record(self.base_tokens, layers, noise)
        self.source = self._record(self.source_tokens, layers)

    def _record(self, tokens_BT: Tensor, layers: Sequence[int], noise: Tensor | None = None) -> Recorded:
        model, (num_rows, length) = self.model, tokens_BT.shape
        found: dict[str, Tensor] = {}
        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.num_layers)]
        sites = {f"blocks.{layer}.{self.site.hook}": layer for layer in layers}
        hooks: dict[str, Any] = {
            name: lambda x, name=name: found.update({name: x}) for name in dict.fromkeys((*names, *sites))
        }
        if noise is not None:
            hooks["hook_embed"] = lambda x: x + noise[:, :length]
        cache = self._empty_cache(num_rows, length)
        with hooked(model, hooks, self.points):
            residual_BTE = model.final_residual(tokens_BT, cache=cache)
        at_site = {layer: found[name] for name, layer in sites.items()}
        logits = model.unembed(self.pairs.read(residual_BTE))
        return Recorded([found[name] for name in names], cache.keys, cache.values, at_site, logits)

    def _empty_cache(self, num_rows: int, length: int, start: int = 0, layer: int = 0) -> KVCache:
        """Return a cache with room for `length` positions in the layers from `layer` on, none of the others."""
        model, weight = self.model, self.model.unembedding
        sizes = [0] * layer + [num_rows] * (model.num_layers - layer)
        keys, values = (
            [weight.new_empty(rows, model.settings.key_value_heads, length, width) for rows in sizes]
            for width in (model.d_key, model.d_value)
        )
        return KVCache(keys, values, start, length)

    def patched(self, cells: Sequence[Cell]) -> Tensor:
        """Return the logits at the read positions with each cell patched alone, (N, B, Vocab).

        Args:
            cells: Of one layer.
        """
        layer, num_cells = cells[0][0], len(cells)
        start = min(self.first if position is None else position for *_, position in cells)
        stream_BTE = self.base.streams[layer][:, start:]
        cache = self._empty_cache(num_cells * len(self.pairs), self.end, start, layer)
        for kept, recorded in ((cache.keys, self.base.keys), (cache.values, self.base.values)):
            for at in range(layer, self.model.num_layers):
                kept[at].unflatten(0, (num_cells, -1))[:, :, :, :start] = recorded[at][:, :, :start]
        source = self.source.at_site[layer]

        def replace(activation: Tensor) -> Tensor:
            changed = activation.unflatten(0, (num_cells, -1)).clone()
            for row, (_, unit, position) in enumerate(cells):
                first, last = (start, self.end) if position is None else (position, position + 1)
                place = self.site.place(unit, slice(first - start, last - start))
                changed[row][place] = source[self.site.place(unit, slice(first, last))]
            return changed.flatten(0, 1)

        with hooked(self.model, {f"blocks.{layer}.{self.site.hook}": replace}, self.points):
            residual_RTE = self.model.continue_from(stream_BTE.repeat(num_cells, 1, 1), layer, cache)
        rows = torch.arange(len(residual_RTE), device=residual_RTE.device)
        read_RE = residual_RTE[rows, self.pairs.positions.repeat(num_cells) - start]
        return self.model.unembed(read_RE).unflatten(0, (num_cells, -1))

    def chunks(self, cells: Sequence[Cell]) -> Iterator[list[Cell]]:
        """Split cells into those of one forward pass: of one layer, and of positions close to each other."""
        for _, of_layer in groupby(sorted(cells, key=lambda cell: (cell[0], cell[2] or 0)), lambda cell: cell[0]):
            chunk: list[Cell] = []
            for cell in of_layer:
                start = self.first if not chunk or chunk[0][2] is None else chunk[0][2]
                length = self.end - start
                is_near = (cell[2] or 0) - start <= length // 8
                if chunk and (not is_near or (len(chunk) + 1) * len(self.pairs) * length > TOKENS_AT_ONCE):
                    yield chunk
                    chunk = []
                chunk.append(cell)
            yield chunk

    def sweep(self, cells: Sequence[Cell], metric: Metric) -> dict[Cell, np.ndarray]:
        """Return the metric with each cell patched alone, (B,) each, in float64."""
        found: dict[Cell, np.ndarray] = {}
        for chunk in self.chunks(cells):
            found |= dict(zip(chunk, self.measured(self.patched(chunk), metric), strict=True))
        return found

    def measured(self, logits_BV: Tensor, metric: Metric) -> np.ndarray:
        """Return the metric of each pair, (..., B), computed in float64: a divergence of 1e-7 is not rounding."""
        return metric(logits_BV.cpu().double(), self.own_pairs).numpy()

    def by_hook(self, cell: Cell, source: Mapping[int, Tensor] | None = None) -> Tensor:
        """Return the logits at the read positions with one cell patched by a hook in a whole forward pass.

        Args:
            source: By layer, what is put in. Default: the source run.
        """
        layer, unit, position = cell
        taken = (self.source.at_site if source is None else source)[layer]
        place = self.site.place(unit, slice(None) if position is None else slice(position, position + 1))

        def replace(activation: Tensor) -> Tensor:
            changed = activation.clone()
            changed[place] = taken[place]
            return changed

        hooks: dict[str, Any] = {f"blocks.{layer}.{self.site.hook}": replace}
        with hooked(self.model, hooks, self.points), hooked(self.model, self._noise_hooks(), self.points):
            return self.pairs.read(self.model.logits(self.base_tokens))

    def _noise_hooks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        noise = self.noise
        return {} if noise is None else {"hook_embed": lambda x: x + noise[:, : self.end]}

    def attribution(self, layers: Sequence[int], metric: Metric) -> dict[int, np.ndarray]:
        """Return `sum (source - base) * gradient at base` by layer, (B, T, U), or (B, T) without units."""
        names = [f"blocks.{layer}.{self.site.hook}" for layer in layers]
        with hooked(self.model, self._noise_hooks(), self.points):
            _, activations, gradients = run_with_gradients(
                self.model,
                self.base_tokens,
                lambda output: metric(self.pairs.read(output.logits).cpu().double(), self.own_pairs).sum(),
                names,
            )
        found = {}
        for layer, name in zip(layers, names, strict=True):
            product = float64((self.source.at_site[layer] - activations[name]) * gradients[name])
            if self.site.position_axis == 2:
                product = product.swapaxes(1, 2)
            if self.site.unit and product.ndim == 4:
                product = product.sum(3)
            found[layer] = product if self.site.unit else product.sum(2)
        return found


@dataclass(frozen=True, kw_only=True)
class Patching(Result):
    """How much of the difference between two runs each patched activation carries.

    With `axes` of layers, units and positions, each of length 1 where all of them are patched together:

    Attributes:
        site: what is patched, a name of `SITES`.
        by: whether a cell is a `layer`, a `position` of it, a `unit` of it, or a unit at a position (`both`).
        kind: one of `KINDS`.
        metric: what the effect is measured by.
        layers: (L,) counted from 0.
        units: (U,) heads or neurons, counted from 0; empty where all are patched together.
        unit: their letter: H heads, G groups of heads with shared keys and values, N neurons.
        positions: (P,) patched positions; empty where all are patched together.
        tokens, corrupt_tokens: (B, T) ids of the clean and the corrupt prompts.
        read_positions: (B,) where the predictions are read.
        targets, versus: (B,) tokens that the metric compares; empty where it compares none.
        groups: (B,) what the intervals resample together.
        draws: of noise; 1 without noise.
        clean, corrupt: (B,) the metric of both runs; with noise there are B rows for each draw.
        patched: (L, U, P, B) the metric with each cell patched.
        effects: (L, U, P) the share of the difference that a cell carries: 1 is all of it.
        low, high: (L, U, P) the 95 % interval of it over prompts; NaN for fewer than 8.
        estimates: (L, U, P) the same from gradients: attribution patching; None unless asked for.
        gradient_at: the run at which the gradient is taken.
        pearson, spearman: correlations of `estimates` with `effects` over the cells that can have an effect.
    """

    site: str
    by: str
    kind: str
    metric: str
    layers: tuple[int, ...]
    units: tuple[int, ...]
    unit: str
    positions: tuple[int, ...]
    tokens: np.ndarray
    corrupt_tokens: np.ndarray
    read_positions: np.ndarray
    targets: np.ndarray
    versus: np.ndarray
    groups: np.ndarray
    draws: int
    clean: np.ndarray
    corrupt: np.ndarray
    patched: np.ndarray
    effects: np.ndarray
    low: np.ndarray
    high: np.ndarray
    estimates: np.ndarray | None
    gradient_at: str | None
    pearson: float | None
    spearman: float | None

    def unit_label(self, layer: int, unit: int) -> str:
        """Return such as L1H3."""
        return f"L{layer}{self.unit}{unit}"

    def rows(self) -> Iterator[Mapping[str, Any]]:
        axes: dict[str, Sequence[Any]] = {"layer": self.layers}
        axes |= {"unit": self.units or [None], "position": self.positions or [None]}
        columns = {"effect": self.effects, "low": self.low, "high": self.high}
        columns |= {} if self.estimates is None else {"estimate": self.estimates}
        return table(axes, patched=self.patched.mean(-1), **columns)


def patch(
    model: Transformer,
    pairs: PromptPairs,
    site: str = "resid_pre",
    by: str = "position",
    kind: str = "denoising",
    metric: str | None = None,
    layers: Sequence[int] | None = None,
    units: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    attribution: bool = False,
    seed: int = 0,
) -> Patching:
    """Replace an activation of one run by that of another, and measure how much of their difference comes along.

    - `denoising`: the run on the corrupt prompt gets an activation of the clean one. `D = (M_patched - M_corrupt) /
      (M_clean - M_corrupt)`: 1 if the activation is sufficient.
    - `noising`: the run on the clean prompt gets an activation of the corrupt one. `N = (M_clean - M_patched) /
      (M_clean - M_corrupt)`: 1 if all depends on it.
    - `tracing` (Meng et al. 2022, "Locating and Editing Factual Associations in GPT"): denoising, where the corrupt
      run is the clean prompt with noise of 3 standard deviations of the token embedding on the tokens in which the
      prompts differ; the same 10 draws for every cell.

    M is the metric, and the ratio is one of sums over prompts. Vig et al. 2020, "Investigating Gender Bias in Language
    Models Using Causal Mediation Analysis"; practice: Zhang & Nanda 2023, "Towards Best Practices of Activation
    Patching in Language Models"; denoising or noising: Heimersheim & Nanda 2024, "How to Use and Interpret Activation
    Patching".

    With `attribution` there is an estimate beside each effect, `sum (a_source - a_base) dM/da` with the gradient at
    the base run, the one that is patched (Nanda 2023, "Attribution Patching").

    Args:
        pairs: with targets, unless the metric is `kl`.
        site: a name of `SITES`.
        by: one of `BY`: what is patched together.
        metric: a name of `lumiere.interpret.metrics` (None: `default_metric`).
        layers, units, positions: which of them (None: all).
        seed: of the intervals and of the noise.

    Raises:
        LumiereError: an unknown choice; the model lacks the site; the metric hardly differs between both runs; the
            gradient of `kl` is asked for at the clean run, where it is 0.
    """
    check_choice("site", site, SITES)
    check_choice("unit of patching", by, BY)
    check_choice("kind", kind, KINDS)
    where, name = SITES[site], metric or default_metric(pairs)
    count = where.count(model)
    if by in ("unit", "both") and not where.unit:
        raise LumiereError(f"{site} has no heads or neurons", "patch it by position or by layer")
    if attribution and name == "kl" and kind == "noising":
        raise LumiereError(
            "the gradient of KL is 0 at the clean run, so it estimates nothing",
            "take another metric, or denoising, whose gradient is at the corrupt run",
        )
    layers = selected(layers, model.num_layers)
    units = selected(units, count) if by in ("unit", "both") else ()
    positions = selected(positions, pairs.clean.shape[1]) if by in ("position", "both") else ()
    draws = DRAWS if kind == "tracing" else 1
    device = next(model.parameters()).device
    rows = pairs.select(list(range(len(pairs))) * draws).to(device)
    clean, corrupt = rows.clean, rows.corrupt
    base, source = (clean, corrupt) if kind == "noising" else (corrupt, clean)
    noise = None
    if kind == "tracing":
        base, noise = clean, draw_noise(model, rows, seed)
    groups = np.arange(len(rows)) if draws > 1 else pairs.groups
    with torch.no_grad():
        patcher = Patcher(model, rows, where, base, source, layers, noise)
        run_of_clean, run_of_corrupt = patcher.source, patcher.base
        if kind == "noising":
            run_of_clean, run_of_corrupt = run_of_corrupt, run_of_clean
        measure = find_metric(name, run_of_clean.logits.cpu().double())
        clean_B, corrupt_B = (patcher.measured(run.logits, measure) for run in (run_of_clean, run_of_corrupt))
        base_B, source_B = (clean_B, corrupt_B) if kind == "noising" else (corrupt_B, clean_B)
        largest = max(1.0, float(run_of_clean.logits.abs().max()))
        least = PRECISION * torch.finfo(run_of_clean.logits.dtype).eps * largest
        # Refuse a difference of about 0 before the work.
        ratio_interval(np.zeros(len(rows)), source_B - base_B, groups, seed, least=least)
        grid = [(at, unit, position) for at in layers for unit in units or [None] for position in positions or [None]]
        # Before the first difference both runs are equal, and after the last read position nothing is seen.
        active = [cell for cell in grid if cell[2] is None or patcher.first <= cell[2] < patcher.end]
        found = patcher.sweep(active, measure)
        receipts = check(patcher, active, found, measure, base_B, source_B)
    shape = (len(layers), len(units) or 1, len(positions) or 1)
    patched = np.stack([found.get(cell, base_B) for cell in grid]).reshape(*shape, len(rows))
    effects, low, high = ratio_interval(patched - base_B, source_B - base_B, groups, seed)
    estimates = pearson = spearman = None
    if attribution:
        numerators = estimated(patcher, measure, layers, units, positions)
        estimates = numerators.sum(-1) / (source_B - base_B).sum()
        is_active = np.array([cell in found for cell in grid]).reshape(shape)
        pearson, spearman = correlations(estimates[is_active], effects[is_active])
    grouped = where.hook in ("attn.hook_k", "attn.hook_v") and count != model.num_heads
    return Patching(
        site=site,
        by=by,
        kind=kind,
        metric=name,
        layers=layers,
        units=units,
        unit="G" if grouped else where.unit,
        positions=positions,
        tokens=pairs.clean.numpy(),
        corrupt_tokens=pairs.corrupt.numpy(),
        read_positions=pairs.positions.numpy(),
        targets=np.array([]) if pairs.targets is None else pairs.targets.numpy(),
        versus=np.array([]) if pairs.versus is None else pairs.versus.numpy(),
        groups=pairs.groups,
        draws=draws,
        clean=clean_B,
        corrupt=corrupt_B,
        patched=patched,
        effects=effects,
        low=low,
        high=high,
        estimates=estimates,
        gradient_at=None if estimates is None else "clean" if kind == "noising" else "corrupt",
        pearson=pearson,
        spearman=spearman,
        receipts=receipts,
    )


def draw_noise(model: Transformer, rows: PromptPairs, seed: int) -> Tensor:
    """Return noise for the token embeddings where the prompts differ, (B, T, E), 0 elsewhere."""
    weight = model.token_embedding.weight
    generator = torch.Generator().manual_seed(seed)
    # Drawn in float64 on the CPU, so that it is the same in every precision and on every device.
    drawn = torch.randn(*rows.clean.shape, model.embedding_size, generator=generator, dtype=torch.float64)
    return drawn.to(weight.dtype).to(weight.device) * (NOISE * weight.std()) * rows.changed.unsqueeze(-1)


def check(
    patcher: Patcher,
    cells: Sequence[Cell],
    found: Mapping[Cell, np.ndarray],
    measure: Metric,
    base_B: np.ndarray,
    source_B: np.ndarray,
) -> tuple[Receipt, ...]:
    """Check the base run patched with itself, the whole stream patched, and cells spread over all by hooks."""

    def error(logits_BV: Tensor, expected_B: np.ndarray) -> float:
        return relative_error(torch.from_numpy(patcher.measured(logits_BV, measure)), torch.from_numpy(expected_B))

    whole = (0, None, None)
    stream = Patcher(
        patcher.model, patcher.pairs, SITES["resid_pre"], patcher.base_tokens, patcher.source_tokens, [0], patcher.noise
    )
    errors = {"the whole first stream patched is the other run": error(stream.patched([whole])[0], source_B)}
    if cells:
        strongest = max(cells, key=lambda cell: abs(float((found[cell] - base_B).sum())))
        own = patcher.by_hook(strongest, patcher.base.at_site)
        errors["an activation patched with itself changes nothing"] = error(own, base_B)
        sample = [strongest, *cells[:: max(1, len(cells) // (MAX_RECEIPT_CELLS - 1))]][:MAX_RECEIPT_CELLS]
        differences = [error(patcher.by_hook(cell), found[cell]) for cell in sample]
        errors[f"{len(sample)} cells, by hooks in whole forward passes"] = max(differences)
    return tuple(Receipt(name, value, rounding(patcher.model)) for name, value in errors.items())


def estimated(
    patcher: Patcher,
    measure: Metric,
    layers: Sequence[int],
    units: Sequence[int],
    positions: Sequence[int],
) -> np.ndarray:
    """Return what attribution patching estimates for each cell and prompt, (L, U, P, B)."""
    whole = []
    for found in patcher.attribution(layers, measure).values():
        if found.ndim == 2:
            found = found[:, :, None]
        # Positions after the last read one were not run.
        padded_BTU = np.zeros((len(found), patcher.pairs.clean.shape[1], found.shape[2]))
        padded_BTU[:, : patcher.end] = found
        over_units = padded_BTU[:, :, list(units)] if units else padded_BTU.sum(2, keepdims=True)
        chosen = over_units[:, list(positions)] if positions else over_units.sum(1, keepdims=True)
        whole.append(chosen.transpose(2, 1, 0))
    return np.stack(whole)


def correlations(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return the correlations of Pearson and Spearman; NaN for fewer than two values, or equal ones."""

    def pearson(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x - x.mean(), y - y.mean()
        norms = float(np.linalg.norm(x) * np.linalg.norm(y))
        return float(x @ y) / norms if norms else float("nan")

    def ranks(x: np.ndarray) -> np.ndarray:
        # Equal values share the mean of their ranks.
        return np.searchsorted(np.sort(x), x, "left") + np.searchsorted(np.sort(x), x, "right")

    return pearson(x, y), pearson(ranks(x), ranks(y))
