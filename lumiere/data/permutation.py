"""A keyed permutation of `range(size)`, computed index by index in constant memory.

A balanced Feistel network permutes a range of 4^k numbers; an image outside `range(size)` is permuted again until
it falls inside ("cycle-walking", Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Since any index
can be computed alone, the order of an epoch needs no list to keep, to save, or to share between processes.
"""

import hashlib

import numpy as np

ROUNDS = 8


def permute(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where each index goes.

    Args:
        indices: (N,) integers in `range(size)`.
        size: how many numbers are permuted.
        key: chooses the permutation.

    Returns:
        (N,) int64, distinct for distinct indices.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = round_keys(key)
    images = feistel(indices.astype(np.uint64), half_bits, keys)
    # The domain is less than four times `size`, so a few walks do.
    while (outside := images >= size).any():
        images[outside] = feistel(images[outside], half_bits, keys)
    return images.astype(np.int64)


def feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """One pass through the network: a permutation of the numbers of `2 * half_bits` bits, whatever `mix` is."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right, key) & mask)
    return (left << shift) | right


def mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """SplitMix64's finalizer of each value and the key (Steele et al. 2014)."""
    values = values ^ key
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def round_keys(key: str) -> np.ndarray:
    """(ROUNDS,) uint64, one independent key a round."""
    return np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8")
