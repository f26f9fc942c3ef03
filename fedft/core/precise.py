"""Sums in float64, wherever there is any: Apple's GPUs (``mps``) have none, and raise at the word."""

import torch
from torch import Tensor

_WITHOUT = frozenset({"mps"})


def widest(device: torch.device) -> torch.dtype:
    """The most precise number format of a device: float64, or float32 where it has no float64."""
    return torch.float32 if device.type in _WITHOUT else torch.float64


def widened(x: Tensor) -> Tensor:
    """``x`` in the most precise format of its device."""
    return x.to(widest(x.device))
