"""The graph of a model's circuits: which parts write to the residual stream, and which read it.

Writers are the embedding, the positions where they are added to the stream, each head, and each feed-forward part.
Readers are the queries of each head, its keys and values (where several heads share them, of the group), each
feed-forward part, and the logits. An edge leads from a writer to each reader after it (Elhage et al. 2021; Conmy et al.
2023, "Towards Automated Circuit Discovery"). In a parallel block the feed-forward part reads what attention reads, and
there is no edge from the heads of the block to it.

Shapes: B prompt, T position, E embedding_size, H head, V d_value, W writer, N edge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lumiere.components.hooks import run_with_cache
from lumiere.errors import LumiereError, nearest, quoted
from lumiere.models.transformer import Transformer


@dataclass(frozen=True)
class Reader:
    """A part that reads the stream.

    Attributes:
        name: Such as `L1H0.k`, `L1G0.k` for the keys of a group of heads, `L1.mlp` or `logits`.
        kind: q, k, v, mlp or logits.
        layer: From 0; the number of layers for the logits.
        index: Of the head or group; 0 for the others.
        num_writers: How many writers, the first ones, are before it.
    """

    name: str
    kind: str
    layer: int
    index: int
    num_writers: int


@dataclass(frozen=True)
class EdgeGraph:
    """Writers and readers, both in the order of the computation; an edge is (number of a reader, of a writer)."""

    writers: tuple[str, ...]
    readers: tuple[Reader, ...]

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(N,) all edges, reader by reader."""
        return tuple(
            (place, writer) for place, reader in enumerate(self.readers) for writer in range(reader.num_writers)
        )

    @cached_property
    def names(self) -> tuple[tuple[str, str], ...]:
        """(N,) writer and reader of each edge."""
        return tuple((self.writers[writer], self.readers[place].name) for place, writer in self.edges)

    def chosen(self, names: Sequence[str]) -> Tensor:
        """Return 1 for edges of such names as `embed->L0H1.v`, else 0, (N,).

        Raises:
            LumiereError: There is no such edge.
        """
        places = {f"{source}->{target}": number for number, (source, target) in enumerate(self.names)}
        for name in names:
            if name not in places:
                guess = nearest(name, places)
                raise LumiereError(
                    f"the model has no edge {quoted(name)}",
                    f"did you mean {guess}?" if guess else "lumiere inspect circuit --csv lists all edges",
                )
        is_chosen_N = torch.zeros(len(places))
        is_chosen_N[[places[name] for name in names]] = 1
        return is_chosen_N

    def mask(self, is_cut_N: Tensor) -> Tensor:
        """Return values of edges, (..., N), as a table of readers and writers, (..., readers, W), elsewhere 0."""
        places, writers = torch.tensor(self.edges, device=is_cut_N.device).T
        table = is_cut_N.new_zeros(*is_cut_N.shape[:-1], len(self.readers), len(self.writers))
        table[..., places, writers] = is_cut_N
        return table


def edge_graph(model: Transformer) -> EdgeGraph:
    """Return the graph of a model."""
    writers = ["embed"] + (["pos"] if model.hook_pos_embed is not None else [])
    readers = []
    for layer, block in enumerate(model.blocks):
        groups = block.attention.num_key_value_heads
        letter = "H" if groups == model.num_heads else "G"
        before = len(writers)
        readers += [Reader(f"L{layer}H{head}.q", "q", layer, head, before) for head in range(model.num_heads)]
        readers += [
            Reader(f"L{layer}{letter}{group}.{kind}", kind, layer, group, before)
            for kind in ("k", "v")
            for group in range(groups)
        ]
        writers += [f"L{layer}H{head}" for head in range(model.num_heads)]
        if block.feedforward is not None:
            read = before if block.is_parallel else len(writers)
            readers.append(Reader(f"L{layer}.mlp", "mlp", layer, 0, read))
            writers.append(f"L{layer}.mlp")
    readers.append(Reader("logits", "logits", model.num_layers, 0, len(writers)))
    return EdgeGraph(tuple(writers), tuple(readers))


def count_edges(model: Transformer) -> int:
    """Return the number of edges."""
    return sum(reader.num_writers for reader in edge_graph(model).readers)


def head_writes(model: Transformer, layer: int, z_BTHV: Tensor) -> Tensor:
    """Return what each head of a layer writes to the stream, without the bias, which is no head's, (H, B, T, E)."""
    output = model.blocks[layer].attention.output.weight
    return torch.einsum("bthv,hve->hbte", z_BTHV, output.T.unflatten(0, (model.num_heads, -1)))


def writes_of(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Return what each writer adds to the stream, (W, B, T, E)."""
    names = ["hook_embed"] + (["hook_pos_embed"] if model.hook_pos_embed is not None else [])
    layers = range(model.num_layers)
    heads = [f"blocks.{layer}.attn.hook_z" for layer in layers]
    parts = [f"blocks.{layer}.hook_mlp_out" for layer in layers if model.blocks[layer].feedforward is not None]
    _, cache = run_with_cache(model, tokens_BT, [*names, *heads, *parts])
    writes = [cache[name] for name in names]
    for layer in layers:
        writes += head_writes(model, layer, cache[heads[layer]])
        if parts:
            writes.append(cache[parts[layer]])
    return torch.stack(writes)
