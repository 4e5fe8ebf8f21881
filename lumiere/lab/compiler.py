"""Build a `Transformer` from a program, and list the edges that the construction writes.

The residual stream has a block of coordinates for each operation, which one part of the model writes, and a constant
coordinate. The constant is so large that what the parts write hardly changes a norm, and it stands in for biases. The
result is an ordinary model: RMSNorm, learned positions, ReLU, no biases, an output head of its own. Heads and neurons
that the program does not need get random weights and write to a block that nothing of the program reads. The heads of a
layer are numbered in a random order, and a random rotation mixes the blocks of the stream, so that no circuit can be
read off zeros in the weights.

Shapes: E embedding_size, H head, K d_key, V d_value, F d_ff, W width of an operation, Vocab vocab_size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lumiere.components.layers import feedforward_of
from lumiere.lab.program import Aggregate, Indices, Map, Operation, Tokens
from lumiere.models.transformer import Transformer

Edge = tuple[str, str]
"""Writer and reader, such as `("L0H1", "L1H0.k")`, in the names of `lumiere.interpret.edges`."""
CONSTANT = 300.0
"""The constant coordinate: a part that writes a vector of length 1 changes a norm by 6e-6."""
IDLE_WIDTH, IDLE_NEURONS = 3, 4
"""Of the block that nothing reads, and in each feed-forward part beside those of the program."""


@dataclass(frozen=True)
class Compiled:
    """A model and its circuit.

    Attributes:
        model: In evaluation mode and float64, so that what does not matter is 0 to many digits.
        written: Every edge along which the construction passes something, in the order of the layers; the constant,
            which every part reads from the embedding, is not counted.
        edges: Those of `written` that carry what depends on the tokens. These are the circuit where parts are ablated
            by what they write on another prompt of the same length.
    """

    model: Transformer
    written: tuple[Edge, ...]
    edges: tuple[Edge, ...]


def compile_program(
    output: Operation,
    readout: Tensor,
    offset: Tensor | None = None,
    context_size: int = 16,
    num_heads: int = 4,
    seed: int = 0,
) -> Compiled:
    """Return the model whose logits are `readout @ output + offset`.

    Args:
        output: The last operation of the program. One `Tokens` and at most one `Indices` are below it.
        readout: (Vocab, width of the output); Vocab is at least the width of `Tokens`.
        offset: (Vocab,). Default: 0.
        context_size: Positions, as many as the width of `Indices`.
        num_heads: In each layer; those that the program does not need are idle.
        seed: Of the idle weights, the order of the heads and the rotation.
    """
    generator = torch.Generator().manual_seed(seed)
    return Compiler(output, context_size, num_heads, generator).compile(readout, offset)


class Compiler:
    """One compilation."""

    def __init__(self, output: Operation, context_size: int, num_heads: int, generator: torch.Generator) -> None:
        self.output, self.num_heads, self.generator = output, num_heads, generator
        self.operations = in_order(output)
        if not any(isinstance(operation, Indices) for operation in self.operations):
            self.operations.insert(0, Indices(context_size))
        self.stages = stages_of(self.operations)
        self.num_layers = max(self.stages.values()) // 2 + 1
        self.tokens = next(operation for operation in self.operations if isinstance(operation, Tokens))
        self.indices = next(operation for operation in self.operations if isinstance(operation, Indices))
        self.blocks: dict[Operation, slice] = {}
        size = 0
        for operation in self.operations:
            self.blocks[operation] = slice(size, size + operation.width)
            size += operation.width
        self.idle = slice(size, size + IDLE_WIDTH)
        self.constant = size + IDLE_WIDTH
        self.embedding_size = self.constant + 1
        self.heads = {
            layer: [x for x in self.operations if isinstance(x, Aggregate) and self.stages[x] == 2 * layer]
            for layer in range(self.num_layers)
        }
        self.maps = {
            layer: [x for x in self.operations if isinstance(x, Map) and self.stages[x] == 2 * layer + 1]
            for layer in range(self.num_layers)
        }
        self.orders = {layer: self._order() for layer in range(self.num_layers)}

    def _order(self) -> list[int]:
        return torch.randperm(self.num_heads, generator=self.generator).tolist()

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def compile(self, readout: Tensor, offset: Tensor | None) -> Compiled:
        heads = [head for heads in self.heads.values() for head in heads]
        has_feedforward = any(self.maps.values())
        neurons = max(sum(len(part.offset) for part in maps) for maps in self.maps.values())
        model = Transformer(
            vocab_size=max(len(readout), self.tokens.width),
            embedding_size=self.embedding_size,
            context_size=self.indices.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            d_key=max(IDLE_WIDTH, *(len(head.scores.T) for head in heads if head.scores is not None), 0),
            d_value=max(IDLE_WIDTH, *(head.width for head in heads), 0),
            d_ff=neurons + IDLE_NEURONS,
            dropout=0.0,
            feedforward="relu" if has_feedforward else "none",
            tie_embeddings=False,
        )
        model = model.double().eval()
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in weights.items():
                is_norm = name.endswith("norm.weight")
                parameter.fill_(CONSTANT / math.sqrt(self.embedding_size)) if is_norm else parameter.zero_()
            self._embed(model)
            for layer in range(self.num_layers):
                self._attention(model, layer)
                if has_feedforward:
                    self._feedforward(model, layer)
            assert model.output_head is not None
            model.output_head.weight[: len(readout), self.blocks[self.output]] = readout
            if offset is not None:
                model.output_head.weight[: len(offset), self.constant] = offset / CONSTANT
            rotate_stream(model, random_rotation(self.embedding_size, self.generator))
        edges = self._edges()
        return Compiled(
            model,
            tuple(dict.fromkeys(edge for edge, _ in edges)),
            tuple(dict.fromkeys(edge for edge, varies in edges if varies)),
        )

    def _embed(self, model: Transformer) -> None:
        model.token_embedding.weight[: self.tokens.width, self.blocks[self.tokens]] = torch.eye(self.tokens.width)
        model.token_embedding.weight[:, self.constant] = CONSTANT
        assert model.position_embedding is not None
        model.position_embedding.weight[:, self.blocks[self.indices]] = torch.eye(self.indices.width)

    def _attention(self, model: Transformer, layer: int) -> None:
        attention = model.blocks[layer].attention
        query_HKE, key_HKE, value_HVE = (
            part.weight.view(self.num_heads, -1, self.embedding_size)
            for part in (attention.query, attention.key, attention.value)
        )
        output_EHV = attention.output.weight.view(self.embedding_size, self.num_heads, -1)
        order, heads = self.orders[layer], self.heads[layer]
        for place, head in zip(order, heads, strict=False):
            if head.scores is not None:
                width = head.scores.shape[1]
                for operation in head.query:
                    query_HKE[place, :width, self.blocks[operation]] = head.scores.T / attention.scale
                for operation in head.key:
                    key_HKE[place, :width, self.blocks[operation]] = torch.eye(width)
            projection = torch.eye(head.width) if head.projection is None else head.projection.T
            value_HVE[place, : head.width, self.blocks[head.value]] = projection
            output_EHV[self.blocks[head], place, : head.width] = torch.eye(head.width)
        for place in order[len(heads) :]:
            for weight_HNE in (query_HKE, key_HKE, value_HVE):
                weight_HNE[place, :, : self.constant] = self._random(weight_HNE.shape[1], self.constant)
            output_EHV[self.idle, place] = self._random(IDLE_WIDTH, output_EHV.shape[2]) / attention.d_value

    def _feedforward(self, model: Transformer, layer: int) -> None:
        feedforward = feedforward_of(model.blocks[layer])
        up_FE, down_EF = feedforward.up.weight, feedforward.down.weight
        first = 0
        for part in self.maps[layer]:
            neurons = slice(first, first + len(part.offset))
            for operation, up in zip(part.sources, part.up, strict=True):
                up_FE[neurons, self.blocks[operation]] += up
            up_FE[neurons, self.constant] = part.offset / CONSTANT
            down_EF[self.blocks[part], neurons] = part.down
            first = neurons.stop
        num_idle = len(up_FE) - first
        up_FE[first:, : self.constant] = self._random(num_idle, self.constant)
        down_EF[self.idle, first:] = self._random(IDLE_WIDTH, num_idle) / num_idle

    def _edges(self) -> list[tuple[Edge, bool]]:
        """Return each edge, and whether what passes along it depends on the tokens."""
        edges = []
        for operation in self.operations:
            if isinstance(operation, Aggregate):
                name = self._writer(operation)
                readers = {"q": operation.query, "k": operation.key, "v": (operation.value,)}
                edges += [(source, f"{name}.{part}") for part, sources in readers.items() for source in sources]
            elif isinstance(operation, Map):
                edges += [(source, self._writer(operation)) for source in operation.sources]
        edges.append((self.output, "logits"))
        return [((self._writer(source), reader), source.varies) for source, reader in edges]

    def _writer(self, operation: Operation) -> str:
        if operation in (self.tokens, self.indices):
            return "embed" if operation is self.tokens else "pos"
        layer = self.stages[operation] // 2
        if isinstance(operation, Aggregate):
            return f"L{layer}H{self.orders[layer][self.heads[layer].index(operation)]}"
        return f"L{layer}.mlp"


def in_order(output: Operation) -> list[Operation]:
    """Return an operation and all below it, each after what it reads."""
    found: dict[Operation, None] = {}
    for operation in output.inputs:
        found |= dict.fromkeys(in_order(operation))
    return [*found, output]


def stages_of(operations: Sequence[Operation]) -> dict[Operation, int]:
    """Return where each operation is computed, as early as it can be: 2 l in the heads of layer l, 2 l + 1 after them.

    Tokens and indices are at -1.
    """
    stages: dict[Operation, int] = {}
    for operation in operations:
        stage = max((stages[source] for source in operation.inputs), default=-2) + 1
        if isinstance(operation, Aggregate):
            stage += stage % 2
        elif isinstance(operation, Map):
            stage += 1 - stage % 2
        stages[operation] = stage
    return stages


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, uniform (Stewart 1980), (size, size)."""
    orthogonal, upper = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return orthogonal * upper.diagonal().sign()


def rotate_stream(model: Transformer, rotation_EE: Tensor) -> None:
    """Express the residual stream in another basis; the logits stay the same, as the gains of all norms are equal."""
    readers = [model.unembedding] if model.output_head is not None else []
    writers = []
    for block in model.blocks:
        readers += [block.attention.query.weight, block.attention.key.weight, block.attention.value.weight]
        writers.append(block.attention.output.weight)
        if block.feedforward is not None:
            readers.append(block.feedforward.up.weight)
            writers.append(block.feedforward.down.weight)
    readers += [model.token_embedding.weight]
    if model.position_embedding is not None:
        readers.append(model.position_embedding.weight)
    for weight_NE in readers:
        weight_NE.copy_(weight_NE.double() @ rotation_EE)
    for weight_EN in writers:
        weight_EN.copy_(rotation_EE.T @ weight_EN.double())
