"""Counter-based random numbers: every draw is a function of what it is for.

A seed is derived from the run's seed, the purpose of the draw, the round and the site, so that
no result depends on the order in which clients are trained, on the number of workers, or on how
often a run was resumed. Nothing in fedft touches a global random state.
"""

import hashlib

import numpy as np
import torch


def derive(run_seed: int, purpose: str, *counters: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive(0, "batches", round, site)``.

    SHA-256 over the parts: distinct purposes and counters give independent streams.
    """
    text = "\x1f".join([str(run_seed), purpose, *map(str, counters)])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_generator(run_seed: int, purpose: str, *counters: int | str) -> torch.Generator:
    """A CPU torch generator for one purpose."""
    return torch.Generator().manual_seed(derive(run_seed, purpose, *counters))


def numpy_generator(run_seed: int, purpose: str, *counters: int | str) -> np.random.Generator:
    """A NumPy generator (Philox, counter-based) for one purpose."""
    return np.random.Generator(np.random.Philox(derive(run_seed, purpose, *counters)))
