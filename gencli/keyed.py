"""Numbers and generators as functions of a key, on numpy alone: the ground of :mod:`gencli.rng`, without torch."""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["digest", "generator"]


def digest(*key: object) -> int:
    """A 127-bit number that depends on every part of ``key`` (numbers, text, tuples of them)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "big") >> 1


def generator(*key: object) -> np.random.Generator:
    """A numpy generator for ``key``: for drawn data sets, splits and orders."""
    return np.random.Generator(np.random.PCG64(digest(*key)))
