"""One forward pass of the cohort engine, as its layers see it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedft.clients.engines.neftune import Noise
from fedft.clients.engines.stacked import Segments
from fedft.clients.engines.unpadded import Step, form_now
from fedft.core.errors import MismatchError
from fedft.core.tasks.criterion import Criterion


class RowsMismatch(MismatchError):
    """A layer's input is not the rows of the batch, client by client: the engine does not hold."""


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


def segments_of(now: Pass, x: Tensor) -> Segments:
    """How many of the vectors in ``x`` belong to each site.

    Raises:
        RowsMismatch: ``x`` is not the rows of the pass.
    """
    step, form = now.step, form_now()
    rows, count = sum(step.rows), x.numel() // x.shape[-1]
    if form == "packed":
        fits = count == sum(step.tokens)
    else:  # windows and experts of a row may lie beside each other, but no two rows' mixed
        fits = count % rows == 0 and (form == "first" or x.shape[0] % rows == 0)
    if not fits:
        raise RowsMismatch(
            f"a linear layer gets {list(x.shape)}, which {rows} rows of {len(step.rows)} clients do "
            "not come to",
            fix="Set [engine] cohort = 1.",
        )
    return step.tokens if form == "packed" else tuple(count // rows * n for n in step.rows)


def of_each(
    head: nn.Module, stacked: Mapping[str, Tensor], rows: Sequence[int], x: Tensor
) -> Tensor:
    """A head module on each site's rows with that site's own tensors. [n, …]

    Args:
        head: of the base.
        stacked: its tensors by name, [K, …].
        rows: of each site.
        x: its input, in the dtype of the tensors. [n, …]
    """
    if isinstance(head, nn.Linear) and len(set(rows)) == 1:
        y = torch.bmm(x.reshape(len(rows), -1, x.shape[-1]), stacked["weight"].mT)
        y = y + stacked["bias"][:, None] if "bias" in stacked else y
        return y.view(*x.shape[:-1], -1)
    each = [
        dict(zip(stacked, own, strict=True))
        for own in zip(*(tensor.unbind() for tensor in stacked.values()), strict=True)
    ]
    parts = zip(each, x.split(list(rows)), strict=True)
    return torch.cat([functional_call(head, own, (x_k,)) for own, x_k in parts])


def one_client(rows: int) -> Step:
    """What the layers have to know where all rows are one client's, and nothing is scored."""
    return Step({}, torch.zeros(0), None, (0,), (rows,), (rows,), (1,), (rows,), None)


def rewind(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    """Put generators back to where they were."""
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
