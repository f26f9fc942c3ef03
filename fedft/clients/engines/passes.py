"""One forward pass of the cohort engine, as its layers see it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedft.clients.engines.neftune import Noise
from fedft.clients.engines.stacked import Segments
from fedft.clients.engines.unpadded import Step
from fedft.core.tasks.criterion import Criterion


@dataclass
class Pass:
    """What the layers need to know of the pass in hand.

    Attributes:
        step: the rows.
        leaves: the sites' tensors by PEFT name, [K, …].
        scales: LoRA's s of each site.
        generators: dropout's random numbers of each site; empty without dropout.
        criteria: by which each site trains; None where it is by the task's own loss.
        noises: NEFTune's of each site; empty without.
        shares: what of each site's step this pass is.
        noised: whether its embeddings have got their noise.
        wide: the last input of an adapted layer, and its rows in the factors' dtype: queries and
            values have the same input.
        row_scales: ``scales`` by row, per segments, [n, 1].
        encoded: what the encoder gave, once the decoder runs.
        bare: no adapter is to be in it.
    """

    step: Step
    leaves: Mapping[str, Tensor]
    scales: tuple[float, ...]
    generators: Sequence[torch.Generator] = ()
    criteria: Sequence[Criterion | None] = ()
    noises: Sequence[Noise] = ()
    shares: Sequence[float] = ()
    noised: bool = False
    wide: tuple[Tensor, Tensor] | None = None
    encoded: Tensor | None = None
    row_scales: dict[Segments, Tensor] = field(default_factory=dict[Segments, Tensor])
    bare: bool = False


def scale_of_rows(now: Pass, segments: Segments) -> float | Tensor:
    """LoRA's s: a number where all sites share it, else one for each row, [n, 1]."""
    if len(set(now.scales)) == 1:
        return now.scales[0]
    if segments not in now.row_scales:
        dtype, device = next(iter(now.leaves.values())).dtype, now.step.targets.device
        scales = torch.tensor(now.scales, dtype=dtype)
        now.row_scales[segments] = scales.repeat_interleave(torch.tensor(segments)).to(device)[
            :, None
        ]
    return now.row_scales[segments]


def total(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum; of one, itself."""
    first, *others = tensors
    for other in others:
        first = first + other
    return first
