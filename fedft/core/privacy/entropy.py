"""Randomness that nobody can repeat: for noise and sampling that protect people.

Everything else in fedft is a function of the run's seed (:mod:`fedft.core.seeds`). Noise that could
be drawn again could be subtracted again, so that nothing here takes a seed: numbers come from the
keystream of AES-256 in counter mode (NIST SP 800-38A) under a key that the operating system gives.

A statistical generator will not do, however it is seeded. torch's on the CPU keeps 32 bits of its
seed: all its streams can be tried in hours, and the one that leaves the least behind is the noise.
"""

import os
import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

KEY_BYTES = 32
_CHUNK = 1 << 16
"""Numbers made at a time, which the processor's cache holds."""


class Keystream:
    """Random numbers under a key of its own.

    A process that was forked from the one that made it takes a new key: two processes never go
    through the same stream. Not to be shared between threads.

    Args:
        key: for tests against published vectors; None takes one from the operating system.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._take(secrets.token_bytes(KEY_BYTES) if key is None else key)

    def _take(self, key: bytes) -> None:
        self._process = os.getpid()
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def bytes(self, count: int) -> bytes:
        """The next bytes of the stream."""
        if os.getpid() != self._process:
            self._take(secrets.token_bytes(KEY_BYTES))
        return self._cipher.update(bytes(count))

    def random(self, count: int, /) -> NDArray[np.float64]:
        """Uniform on [0, 1), in steps of 2^-53. [count]"""
        return (self._words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, count: int, /) -> NDArray[np.float64]:
        """Independent standard normal numbers, by Box and Muller. [count]

        These are floating-point numbers, whose last bits are not those of a Gaussian: noise is
        added by :mod:`fedft.core.privacy.mechanism`, which rounds them off.
        """
        normal = np.empty(count)
        for first in range(0, count, _CHUNK):
            part = normal[first : first + _CHUNK]
            half = (len(part) + 1) // 2
            radius = np.sqrt(-2 * np.log(self._positive(half)))
            angle = 2 * np.pi * self.random(half)
            part[:half] = radius * np.cos(angle)
            part[half:] = (radius * np.sin(angle))[: len(part) - half]
        return normal

    def _positive(self, count: int) -> NDArray[np.float64]:
        """Uniform on (0, 1], down to 2^-117: the tails of a Gaussian end at 12.7, not at 8.6."""
        return (self._words(count).astype(np.float64) + (1 - self.random(count))) * 2.0**-64

    def _words(self, count: int) -> NDArray[np.uint64]:
        return np.frombuffer(self.bytes(8 * count), dtype="<u8")


def gaussian(count: int) -> Tensor:
    """Independent standard normal numbers, of a keystream of their own. [count], float64"""
    return torch.from_numpy(Keystream().normal(count))  # pyright: ignore[reportUnknownMemberType]
