"""NEFTune: noise on the embeddings of words, in training alone.

    Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", ICLR 2024,
    arXiv:2310.05914.

With L tokens in a row, padding included, and embeddings of d numbers, each of them gets uniform noise
between -alpha / sqrt(L d) and alpha / sqrt(L d), as in transformers and TRL. L is the length of the
client's own batch, and the noise comes from a generator of (seed, round, client): a client gets the
same in both engines and in any company.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedft.core import seeds
from fedft.core.errors import MismatchError
from fedft.core.types import TrainPlan


class Noise:
    """The noise of one client in one round.

    Args:
        plan: of the client.
    """

    def __init__(self, plan: TrainPlan) -> None:
        self._alpha = plan.training.neftune_alpha
        self._generator = seeds.torch_generator(plan.seed, "neftune", plan.round, plan.site)

    def draw(self, rows: int, length: int, width: int) -> Tensor:
        """[rows, length, width] float32, on the CPU"""
        if not self._alpha:
            return torch.zeros(rows, length, width)
        most = self._alpha / (length * width) ** 0.5
        return torch.empty(rows, length, width).uniform_(-most, most, generator=self._generator)


@contextmanager
def noisy(model: nn.Module, noise: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """For the time of the context, embeddings come with noise; None adds none.

    Args:
        model: any of transformers.
        noise: embeddings [n, t, d] → what is added to them.

    Raises:
        MismatchError: the model has an encoder and a decoder.
    """
    if noise is None:
        yield
        return
    found: Any = model
    if getattr(found.config, "is_encoder_decoder", False):  # its one table may never be called
        raise MismatchError(
            "[training] neftune-alpha: this model looks words up in an encoder and a decoder",
            fix="Leave neftune-alpha out.",
        )
    hook = found.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, embedded: embedded + noise(embedded)
    )
    try:
        yield
    finally:
        hook.remove()


def alone(plan: TrainPlan) -> Callable[[Tensor], Tensor] | None:
    """The noise of a client that trains by itself; None where it is asked for none."""
    if not plan.training.neftune_alpha:
        return None
    own = Noise(plan)

    def noise(embedded: Tensor) -> Tensor:
        rows, length, width = embedded.shape
        return own.draw(rows, length, width).to(embedded)

    return noise


def together(
    own: Sequence[Noise],
    rows: Sequence[int],
    lengths: Sequence[int],
    embedded: Tensor,
    side: Literal["left", "right"],
) -> Tensor:
    """The noise of several clients' rows under each other, each as it would be alone. [n, t, d]

    Args:
        own: of each client.
        rows: of each client.
        lengths: tokens of each client's longest row.
        embedded: [n, t, d], whose t is the largest of ``lengths``.
        side: where shorter rows get more padding.
    """
    _, longest, width = embedded.shape
    drawn: list[Tensor] = []
    for noise, n, length in zip(own, rows, lengths, strict=True):
        more = longest - length
        pads = (0, 0, more, 0) if side == "left" else (0, 0, 0, more)
        drawn.append(F.pad(noise.draw(n, length, width), pads))
    return torch.cat(drawn).to(embedded)
