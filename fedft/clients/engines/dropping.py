"""Dropout's masks of several sites in one pass: each as if its site trained alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fedft.clients.engines.unpadded import Step, form_now

if TYPE_CHECKING:
    from fedft.clients.engines.stacked import Segments


def masks(
    x: Tensor,
    step: Step,
    lengths: "Segments",
    generators: Sequence[torch.Generator],
    keep: float,
    dtype: torch.dtype,
) -> Tensor:
    """The mask over the vectors in ``x`` by site, as ``nn.Dropout`` draws it, times 1 / (1 - p).

    A site's mask is drawn for its own padded batch, as it would be if it trained alone.

    Args:
        x: input of an adapted layer.
        step: the rows.
        lengths: tokens of each site's longest row, in the stream that ``x`` belongs to.
        generators: of each site.
        keep: probability of keeping an input.
        dtype: of the factors.
    """
    sequence = form_now() != "padded" or (x.ndim == 3 and max(lengths) > 1)
    width = max(lengths) if sequence else 0
    found: list[Tensor] = []
    for generator, rows, length in zip(generators, step.rows, lengths, strict=True):
        shape = (rows, length, x.shape[-1]) if sequence else (rows, *x.shape[1:])
        own = torch.empty(shape, dtype=dtype).bernoulli_(keep, generator=generator)
        own = F.pad(own, (0, 0, 0, width - length)) if sequence else own
        found.append(own.div_(keep))
    mask = torch.cat(found).to(x.device).reshape(-1, x.shape[-1])
    return mask if step.layout is None else step.layout.select(mask)
