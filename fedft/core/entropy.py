"""Randomness that nobody can repeat: the operating system's, for noise and sampling that protect people.

Everything else in fedft is a function of the run's seed (:mod:`fedft.core.seeds`). Noise that could
be drawn again could be subtracted again, so that nothing here takes a seed.
"""

import os
import secrets

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TERMS = 4
"""Gaussians added up for one. A single Box-Muller value reveals by its last bits, which floating-point
numbers can be reached, what it was added to (Mironov, CCS 2012); a sum of four makes solving for
them infeasible (Holohan and Braghin, 2021, arXiv:2107.10138)."""


def gaussian(count: int) -> Tensor:
    """Independent standard normal numbers. [count], float64"""
    total = np.zeros(count)
    for _ in range(_TERMS):
        total += _box_muller(count)
    return torch.as_tensor(total / np.sqrt(_TERMS))


def generator() -> np.random.Generator:
    """A NumPy generator (Philox) with a key of 128 bits that was never used before."""
    return np.random.Generator(np.random.Philox(key=secrets.randbits(128)))


def _box_muller(count: int) -> NDArray[np.float64]:
    pairs = (count + 1) // 2
    radius = np.sqrt(-2 * np.log(_uniform(pairs)))
    angle = 2 * np.pi * _uniform(pairs)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def _uniform(count: int) -> NDArray[np.float64]:
    """Uniform on (0, 1], in steps of 2^-53."""
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    return (bits.astype(np.float64) + 1) * 2.0**-53
