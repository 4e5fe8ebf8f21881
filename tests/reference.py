"""The transformer in numpy, one sequence, one head and one position at a time, written from the equations."""

import math

import numpy as np
from numpy.typing import NDArray

from lumiere.config.schema import ModelConfig, RotaryScaling

Array = NDArray[np.floating]
CARD = ModelConfig()


def norm(x: Array, gain: Array | float, bias: Array | float = 0.0, kind: str = "rms", epsilon: float = 1e-6) -> Array:
    if kind == "none":
        return x
    if kind.startswith("layer"):
        x = x - np.mean(x)
    return x / np.sqrt(np.mean(x**2) + epsilon) * gain + bias


def scaled(frequency: float, scaling: RotaryScaling) -> float:
    """A frequency of RoPE after scaling, by the cases of Llama 3.1."""
    if scaling.type == "linear":
        return frequency / scaling.factor
    assert scaling.original_context_size is not None
    wavelength, context = 2 * math.pi / frequency, scaling.original_context_size
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / scaling.factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def rotate(vector: Array, position: int, settings: ModelConfig) -> Array:
    """RoPE as a product of complex numbers: pair i of the first R numbers is (vector[i], vector[i + R / 2])."""
    size = round(settings.d_key * settings.rotary_fraction)
    half, scaling = size // 2, settings.rotary_scaling
    frequencies = settings.rotary_base ** (-2 * np.arange(half) / size)
    if scaling is not None:
        frequencies = np.array([scaled(frequency, scaling) for frequency in frequencies.tolist()])
    turned = (vector[:half] + 1j * vector[half:size]) * np.exp(1j * position * frequencies)
    return np.concatenate([turned.real, turned.imag, vector[size:]])


def sinusoid(position: int, size: int) -> Array:
    angles = [position / 10_000 ** (2 * (i // 2) / size) for i in range(size)]
    return np.array([math.cos(angle) if i % 2 else math.sin(angle) for i, angle in enumerate(angles)])


def gelu(x: Array) -> Array:
    return x * (1 + np.array([math.erf(number / math.sqrt(2)) for number in x], dtype=x.dtype)) / 2


ACTIVATIONS = {
    "swiglu": lambda x: x / (1 + np.exp(-x)),
    "geglu": gelu,
    "gelu": gelu,
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


class Part:
    """The weights whose names begin with a prefix; what is missing is 0, or 1 if it is a gain."""

    def __init__(self, weights: dict[str, Array], prefix: str, settings: ModelConfig) -> None:
        self.weights, self.prefix, self.settings = weights, prefix, settings

    def linear(self, name: str, x: Array) -> Array:
        return self.weights[f"{self.prefix}{name}.weight"] @ x + self.weights.get(f"{self.prefix}{name}.bias", 0.0)

    def norm(self, name: str, x: Array, kind: str | None = None) -> Array:
        gain, bias = (
            self.weights.get(f"{self.prefix}{name}.{part}", default)
            for part, default in (("weight", 1.0), ("bias", 0.0))
        )
        return norm(x, gain, bias, kind or self.settings.norm, self.settings.norm_epsilon)


def attention(x: Array, part: Part, window: int | None, real: list[bool]) -> tuple[Array, Array]:
    """What attention adds to each position, (T, E), and the patterns, (H, T, T)."""
    settings, length = part.settings, len(x)
    num_heads, num_groups = settings.num_heads, settings.num_key_value_heads or settings.num_heads
    scale = settings.attention_scale or 1 / math.sqrt(settings.d_key)

    def read(name: str, heads: int, head: int, position: int) -> Array:
        vector = np.split(part.linear(f"attention.{name}", x[position]), heads)[head]
        if name == "value":
            return vector
        if settings.query_key_norm:
            vector = part.norm(f"attention.{name}_norm", vector, "rms")
        if settings.positions != "rotary":
            return vector
        return rotate(vector, position, settings)

    pattern = np.zeros((num_heads, length, length), dtype=x.dtype)
    outputs = []
    for t in range(length):
        heads = []
        for h in range(num_heads):
            group = h * num_groups // num_heads
            visible = [s for s in range(t + 1) if s == t or (real[s] and (window is None or t - s < window))]
            query = read("query", num_heads, h, t)
            weights = np.exp([scale * query @ read("key", num_groups, group, s) for s in visible])
            pattern[h, t, visible] = weights / weights.sum()
            heads.append(sum(pattern[h, t, s] * read("value", num_groups, group, s) for s in visible))
        outputs.append(part.linear("attention.output", np.concatenate(heads)))
    return np.stack(outputs), pattern


def feedforward(x: Array, part: Part) -> Array:
    kind = part.settings.feedforward
    if kind == "none":
        return np.zeros_like(x)
    up, activation = part.linear("feedforward.up", x), ACTIVATIONS[kind]
    if kind in ("swiglu", "geglu"):
        return part.linear("feedforward.down", activation(part.linear("feedforward.gate", x)) * up)
    return part.linear("feedforward.down", activation(up))


def transformer(
    weights: dict[str, Array], tokens: list[int], settings: ModelConfig = CARD, real: list[bool] | None = None
) -> tuple[Array, Array, Array]:
    """Logits (T, Vocab), attention weights (L, H, T, T) and residual stream (L+1, T, E) of one sequence."""
    stream = [weights["token_embedding.weight"][tokens]]
    if settings.positions == "learned":
        stream[0] = stream[0] + weights["position_embedding.weight"][: len(tokens)]
    if settings.positions == "sinusoidal":
        stream[0] = stream[0] + np.stack([sinusoid(t, settings.embedding_size) for t in range(len(tokens))]).astype(
            stream[0].dtype
        )
    patterns = []
    for layer in range(settings.num_layers):
        part = Part(weights, f"blocks.{layer}.", settings)
        window = settings.attention_windows[layer] if settings.attention_windows else None
        normalized = np.stack([part.norm("attention_norm", row) for row in stream[-1]])
        added, pattern = attention(normalized, part, window, real or [True] * len(tokens))
        patterns.append(pattern)
        middle = stream[-1] + added
        read = stream[-1] if settings.parallel_blocks else middle
        stream.append(middle + np.stack([feedforward(part.norm("feedforward_norm", row), part) for row in read]))
    final = np.stack([Part(weights, "", settings).norm("final_norm", row) for row in stream[-1]])
    return (
        final @ weights.get("output_head.weight", weights["token_embedding.weight"]).T,
        np.stack(patterns),
        np.stack(stream),
    )
