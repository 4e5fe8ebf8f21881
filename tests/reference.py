"""The transformer in numpy, one sequence, one head and one position at a time, written from the equations."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def rms_norm(x: Array, gain: Array) -> Array:
    return x / np.sqrt(np.mean(x**2) + 1e-6) * gain


def rotate(vector: Array, position: int) -> Array:
    """RoPE as a product of complex numbers: pair i is (vector[i], vector[i + half])."""
    half = len(vector) // 2
    frequencies = 10_000.0 ** (-2 * np.arange(half) / len(vector))
    turned = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * frequencies)
    return np.concatenate([turned.real, turned.imag])


def attention(x: Array, w: dict[str, Array], num_heads: int, rotary: bool, real: list[bool]) -> tuple[Array, Array]:
    """What attention adds to each position, (T, E), and the patterns, (H, T, T)."""
    length = len(x)
    pattern = np.zeros((num_heads, length, length), dtype=x.dtype)
    outputs = []
    for t in range(length):
        heads = []
        for h in range(num_heads):
            query, key, value = (np.split(w[name], num_heads)[h] for name in ("query", "key", "value"))
            visible = [s for s in range(t + 1) if real[s] or s == t]
            q, keys = query @ x[t], [key @ x[s] for s in visible]
            if rotary:
                q, keys = rotate(q, t), [rotate(k, s) for k, s in zip(keys, visible, strict=True)]
            weights = np.exp([q @ k / np.sqrt(len(q)) for k in keys])
            pattern[h, t, visible] = weights / weights.sum()
            heads.append(sum(pattern[h, t, s] * (value @ x[s]) for s in visible))
        outputs.append(w["output"] @ np.concatenate(heads))
    return np.stack(outputs), pattern


def swiglu(x: Array, w: dict[str, Array]) -> Array:
    gate = w["gate"] @ x
    return w["down"] @ (gate / (1 + np.exp(-gate)) * (w["up"] @ x))


def transformer(
    weights: dict[str, Array], tokens: list[int], num_heads: int, rotary: bool = False, real: list[bool] | None = None
) -> tuple[Array, Array, Array]:
    """Logits (T, Vocab), attention weights (L, H, T, T) and residual stream (L+1, T, E) of one sequence."""
    stream = [weights["token_embedding.weight"][tokens]]
    if not rotary:
        stream[0] = stream[0] + weights["position_embedding.weight"][: len(tokens)]
    patterns = []
    while f"blocks.{len(patterns)}.attention_norm.weight" in weights:
        prefix = f"blocks.{len(patterns)}."
        w = {name.split(".")[-2]: value for name, value in weights.items() if name.startswith(prefix)}
        normalized = np.stack([rms_norm(row, w["attention_norm"]) for row in stream[-1]])
        added, pattern = attention(normalized, w, num_heads, rotary, real or [True] * len(tokens))
        middle = stream[-1] + added
        patterns.append(pattern)
        stream.append(np.stack([row + swiglu(rms_norm(row, w["feedforward_norm"]), w) for row in middle]))
    final = np.stack([rms_norm(row, weights["final_norm.weight"]) for row in stream[-1]])
    return final @ weights["token_embedding.weight"].T, np.stack(patterns), np.stack(stream)
