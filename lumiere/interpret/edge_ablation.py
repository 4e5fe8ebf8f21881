"""Run a model with edges of its graph cut: a reader gets what a writer wrote on other prompts, all others its own.

Everything goes through the model's own hook points, so that each architecture computes its readers itself.

Shapes: B prompt, T position, E embedding_size, H head or group, K width of a projection, W writer, N edge, R run, and
M rows, R * B; Vocab vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lumiere.components.hooks import Hook, hooked, run_with_cache
from lumiere.errors import check_choice
from lumiere.interpret.edges import EdgeGraph, Reader, edge_graph, head_writes, writes_of
from lumiere.interpret.metrics import Metric
from lumiere.interpret.prompts import PromptPairs
from lumiere.models.transformer import Transformer

ABLATIONS = ("corrupt", "mean-per-position", "mean", "zero")
"""What a cut edge carries; see `replacements`."""
NUMBERS_AT_ONCE = 2**24
"""Of the largest tensor of one forward pass: 64 MiB in float32."""
TOKENS_AT_ONCE = 4096
"""Of one forward pass."""


def replacements(clean_WBTE: Tensor, corrupt_WBTE: Tensor, ablation: str) -> Tensor:
    """Return what cut edges carry, (W, B, T, E).

    - `corrupt`: what the writer writes on the corrupt prompt (resample ablation).
    - `mean-per-position`, `mean`: the mean of that over all clean and corrupt prompts, at each position or over all.
    - `zero`: zero.
    """
    check_choice("ablation", ablation, ABLATIONS)
    if ablation == "corrupt":
        return corrupt_WBTE
    if ablation == "zero":
        return torch.zeros_like(clean_WBTE)
    axes = (1,) if ablation == "mean-per-position" else (1, 2)
    return torch.cat([clean_WBTE, corrupt_WBTE], dim=1).mean(axes, keepdim=True).expand_as(clean_WBTE)


class EdgeRuns:
    """The runs of a model on pairs of prompts, with any edges cut.

    Args:
        pairs: On the model's device.
        metric: What a run is measured by.
        ablation: What cut edges carry.
    """

    def __init__(self, model: Transformer, pairs: PromptPairs, metric: Metric, ablation: str = "corrupt") -> None:
        self.model, self.pairs, self.metric, self.ablation = model, pairs, metric, ablation
        self.graph: EdgeGraph = edge_graph(model)
        self.clean_WBTE, self.corrupt_WBTE = (writes_of(model, tokens) for tokens in (pairs.clean, pairs.corrupt))
        self.replacement_WBTE = replacements(self.clean_WBTE, self.corrupt_WBTE, ablation)
        self.clean_B, self.corrupt_B = (self._plain(tokens) for tokens in (pairs.clean, pairs.corrupt))

    @property
    def num_edges(self) -> int:
        return len(self.graph.edges)

    def _plain(self, tokens_BT: Tensor) -> Tensor:
        """Return the metric of an ordinary run, (B,)."""
        return self.measured(self.model.final_residual(tokens_BT))[0]

    def measured(self, final_MTE: Tensor) -> Tensor:
        """Return the metric of each run, (R, B), given the normalized final stream."""
        final_RBTE = final_MTE.unflatten(0, (-1, len(self.pairs)))
        rows = torch.arange(len(self.pairs), device=final_MTE.device)
        return self.metric(self.model.unembed(final_RBTE[:, rows, self.pairs.positions]), self.pairs)

    def runs_at_once(self) -> int:
        """Return how many runs fit into one forward pass."""
        num_writers, num_prompts, length, size = self.clean_WBTE.shape
        numbers = num_prompts * length * size * max(num_writers, 3 * self.model.num_heads)
        return max(1, min(TOKENS_AT_ONCE // (num_prompts * length), NUMBERS_AT_ONCE // numbers))

    def cut(self, is_cut_RN: Tensor) -> Tensor:
        """Return the metric of each run, (R, B), in float64, with the edges cut that are 1 in its row."""
        values = []
        for some_RN in is_cut_RN.split(self.runs_at_once()):
            values.append(self.forward(self.graph.mask(some_RN.to(self.clean_WBTE))[:, None]).detach().double().cpu())
        return torch.cat(values)

    def forward(
        self, cut_RBDW: Tensor, embedding_MTE: Tensor | None = None, change_WBTE: Tensor | None = None
    ) -> Tensor:
        """Return the metric of each run, (R, B), differentiable.

        Reader D gets the stream plus, for each writer, `cut` times the replacement less what the writer writes in this
        run.

        Args:
            cut_RBDW: 1 where an edge is cut, 0 elsewhere, or between them; B may be 1.
            embedding_MTE: Replaces the embedding.
            change_WBTE: Instead of the replacement less what is written.
        """
        num_runs = len(cut_RBDW)
        watch = _Watch(self, cut_RBDW, change_WBTE)
        hooks = watch.hooks()
        if embedding_MTE is not None:
            hooks["hook_embed"] = [lambda _: embedding_MTE, *_listed(hooks["hook_embed"])]
        with hooked(self.model, hooks):
            return self.measured(self.model.final_residual(self.pairs.clean.repeat(num_runs, 1)))

    def replace_writer(self, writer: int) -> Tensor:
        """Return the metric, (B,), where a writer's output is replaced for all readers, by a change of the stream."""
        name = self.graph.writers[writer]
        change_BTE = self.replacement_WBTE[writer] - self.clean_WBTE[writer]
        if not name.startswith("L"):
            point = "hook_embed" if name == "embed" else "hook_pos_embed"
        else:
            layer = int(name[1:].split("H")[0].split(".")[0])
            point = f"blocks.{layer}.hook_{'mlp' if name.endswith('.mlp') else 'attn'}_out"
        with hooked(self.model, {point: lambda written_BTE: written_BTE + change_BTE}):
            return self._plain(self.pairs.clean).double().cpu()

    def each_edge(self) -> Tensor:
        """Return the metric with each edge cut alone, (N, B), in float64.

        Layers before the reader are not computed again, and many writers of one reader make one forward pass.
        """
        model, pairs = self.model, self.pairs
        changes_WBTE = self.replacement_WBTE - self.clean_WBTE
        names = [f"blocks.{layer}.{leaf}" for layer in range(model.num_layers) for leaf in stream_points(model)]
        _, streams = run_with_cache(model, pairs.clean, names)
        at_once = max(1, TOKENS_AT_ONCE // pairs.clean.numel())
        values = []
        for reader in self.graph.readers:
            for some_WBTE in changes_WBTE[: reader.num_writers].split(at_once):
                values.append(self._one_reader(reader, streams, some_WBTE).double().cpu())
        return torch.cat(values)

    def _one_reader(self, reader: Reader, streams: Mapping[str, Tensor], changes_RBTE: Tensor) -> Tensor:
        """Return the metric, (R, B), where the input of one reader, and of no other, is changed."""
        model, layer = self.model, reader.layer
        num_runs = len(changes_RBTE)
        if reader.kind == "logits":
            stream_BTE = streams[f"blocks.{layer - 1}.hook_resid_post"]
            return self.measured(model.final_norm((stream_BTE + changes_RBTE).flatten(0, 1)))
        block, before_BTE = model.blocks[layer], streams[f"blocks.{layer}.hook_resid_pre"]
        if reader.kind == "mlp":
            assert block.feedforward is not None
            assert block.feedforward_norm is not None
            read_BTE = streams.get(f"blocks.{layer}.hook_resid_mid", before_BTE)
            wrote_MTE = block.feedforward(block.feedforward_norm((read_BTE + changes_RBTE).flatten(0, 1)))
            rest_BTE = streams[f"blocks.{layer}.hook_resid_post"] - streams[f"blocks.{layer}.hook_mlp_out"]
            return self.measured(model.continue_from(rest_BTE.repeat(num_runs, 1, 1) + wrote_MTE, layer + 1))
        linear, num_heads = projection(model, layer, reader.kind)
        read_MTE = block.attention_norm((before_BTE + changes_RBTE).flatten(0, 1))
        rows = slice(
            reader.index * linear.out_features // num_heads, (reader.index + 1) * linear.out_features // num_heads
        )
        bias = None if linear.bias is None else linear.bias[rows]
        projected_MTK = nn.functional.linear(read_MTE, linear.weight[rows], bias)

        def replace(activation_MTHK: Tensor) -> Tensor:
            changed = activation_MTHK.clone()
            changed[:, :, reader.index] = projected_MTK
            return changed

        with hooked(model, {f"blocks.{layer}.attn.hook_{reader.kind}": replace}):
            return self.measured(model.continue_from(before_BTE.repeat(num_runs, 1, 1), layer))


def stream_points(model: Transformer) -> list[str]:
    """Return the hook points of a block that `EdgeRuns.each_edge` reads."""
    block = model.blocks[0]
    others = {"hook_resid_mid": block.hook_resid_mid, "hook_mlp_out": block.hook_mlp_out}
    return ["hook_resid_pre", "hook_resid_post", *(name for name, point in others.items() if point is not None)]


def projection(model: Transformer, layer: int, kind: str) -> tuple[nn.Linear, int]:
    """Return the layer's matrix of queries, keys or values, and the number of heads or groups in it."""
    attention = model.blocks[layer].attention
    if kind == "q":
        return attention.query, attention.num_heads
    return (attention.key if kind == "k" else attention.value), attention.num_key_value_heads


class _Watch:
    """The hooks of one forward pass: collect what is written, and give each reader its own input."""

    def __init__(self, runs: EdgeRuns, cut_RBDW: Tensor, change_WBTE: Tensor | None) -> None:
        self.runs, self.model, self.cut_RBDW, self.change_WBTE = runs, runs.model, cut_RBDW, change_WBTE
        self.places = {(reader.layer, reader.kind): [] for reader in runs.graph.readers}
        for place, reader in enumerate(runs.graph.readers):
            self.places[reader.layer, reader.kind].append(place)
        # Without a gradient, readers none of whose edges are cut need no input of their own.
        self.is_used = (cut_RBDW != 0).any(-1).flatten(0, 1).any(0).tolist()
        if cut_RBDW.requires_grad:
            self.is_used = [True] * len(self.is_used)
        self.changes: list[Tensor] = []
        self.streams: dict[str, Tensor] = {}

    def hooks(self) -> dict[str, Any]:
        hooks: dict[str, Any] = {"hook_embed": self.embed}
        if self.model.hook_pos_embed is not None:
            hooks["hook_pos_embed"] = self.embed
        for layer, block in enumerate(self.model.blocks):
            at = f"blocks.{layer}"
            hooks[f"{at}.hook_resid_pre"] = partial(self.keep, "pre")
            hooks |= {f"{at}.attn.hook_{kind}": partial(self.project, layer, kind) for kind in "qkv"}
            hooks[f"{at}.attn.hook_z"] = partial(self.heads, layer)
            if block.hook_resid_mid is not None:
                hooks[f"{at}.hook_resid_mid"] = partial(self.keep, "mid")
            if block.hook_mlp_out is not None:
                hooks[f"{at}.hook_mlp_out"] = partial(self.feedforward, layer)
            hooks[f"{at}.hook_resid_post"] = partial(self.keep, "post")
        hooks["ln_final.hook_normalized"] = self.normalized
        return hooks

    def wrote(self, written_MTE: Tensor) -> None:
        """Note what the next writer writes."""
        if self.change_WBTE is not None:
            change_RBTE = self.change_WBTE[len(self.changes)].expand(len(self.cut_RBDW), -1, -1, -1)
        else:
            replacement_BTE = self.runs.replacement_WBTE[len(self.changes)]
            change_RBTE = replacement_BTE - written_MTE.unflatten(0, (len(self.cut_RBDW), -1))
        self.changes.append(change_RBTE)

    def keep(self, name: str, stream_MTE: Tensor) -> None:
        self.streams[name] = stream_MTE

    def embed(self, written: Tensor) -> None:
        self.wrote(written)

    def heads(self, layer: int, z_MTHV: Tensor) -> None:
        for written_MTE in head_writes(self.model, layer, z_MTHV):
            self.wrote(written_MTE)

    def read(self, layer: int, kind: str, stream_MTE: Tensor) -> Tensor | None:
        """Return what the readers of a kind get, (readers, M, T, E); None if all get the stream."""
        places = self.places[layer, kind]
        if not any(self.is_used[place] for place in places):
            return None
        num_writers = self.runs.graph.readers[places[0]].num_writers
        cut_RBDW = self.cut_RBDW[:, :, places, :num_writers]
        changes_DRBTE = torch.einsum("rbdw,wrbte->drbte", cut_RBDW, torch.stack(self.changes[:num_writers]))
        return stream_MTE + changes_DRBTE.flatten(1, 2)

    def project(self, layer: int, kind: str, activation_MTHK: Tensor) -> Tensor | None:
        read_HMTE = self.read(layer, kind, self.streams["pre"])
        if read_HMTE is None:
            return None
        linear, num_heads = projection(self.model, layer, kind)
        normalized_HMTE = self.model.blocks[layer].attention_norm(read_HMTE)
        weight_HKE = linear.weight.unflatten(0, (num_heads, -1))
        projected_MTHK = torch.einsum("hmte,hke->mthk", normalized_HMTE, weight_HKE)
        if linear.bias is not None:
            projected_MTHK = projected_MTHK + linear.bias.unflatten(0, (num_heads, -1))
        return projected_MTHK

    def feedforward(self, layer: int, written_MTE: Tensor) -> Tensor:
        block = self.model.blocks[layer]
        read_1MTE = self.read(layer, "mlp", self.streams["pre" if block.is_parallel else "mid"])
        if read_1MTE is not None:
            assert block.feedforward is not None
            assert block.feedforward_norm is not None
            written_MTE = block.feedforward(block.feedforward_norm(read_1MTE[0]))
        self.wrote(written_MTE)
        return written_MTE

    def normalized(self, normalized_MTE: Tensor) -> Tensor | None:
        read_1MTE = self.read(self.model.num_layers, "logits", self.streams["post"])
        if read_1MTE is None:
            return None
        norm = self.model.final_norm
        return norm.center(read_1MTE[0]) / norm.scale(read_1MTE[0])


def _listed(hooks: Hook | Sequence[Hook]) -> Sequence[Hook]:
    return [hooks] if callable(hooks) else hooks
