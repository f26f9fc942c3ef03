"""What a model is asked to write a text for, and which one is wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedft.core.types import IGNORED, Batch


@dataclass(frozen=True, eq=False)
class Asked:
    """Rows of a batch that the model is to go on from.

    Attributes:
        inputs: keyword arguments of ``generate``, [n, …]. Prompts of a decoder are padded on the left.
        wanted: token ids of the right answer of each row.
        ahead: tokens of the answer of ``generate`` that stand before what it writes: the prompt, or
            the token with which a decoder of its own starts.
    """

    inputs: Mapping[str, Tensor]
    wanted: Sequence[Sequence[int]]
    ahead: int


def after_prompts(batch: Batch, pad: int) -> Asked:
    """The last answer of each row, from all that stands before it; rows without either are left out.

    Args:
        batch: of a decoder, whose labels are the token ids of its answers. [b, t]
        pad: token id of padding.
    """
    ids, real = batch.inputs["input_ids"], batch.inputs.get("attention_mask")
    prompts: list[Tensor] = []
    wanted: list[list[int]] = []
    for row, (own, labels) in enumerate(zip(ids, batch.labels, strict=True)):
        learned = labels != IGNORED
        at = learned.nonzero().flatten()
        if not len(at):
            continue
        end = int(at[-1]) + 1
        gaps = (~learned[:end]).nonzero().flatten()
        start = int(gaps[-1]) + 1 if len(gaps) else 0
        prompt = own[:start] if real is None else own[:start][real[row, :start] != 0]
        if len(prompt):
            prompts.append(prompt)
            wanted.append([int(token) for token in labels[start:end]])
    width = max(map(len, prompts), default=0)
    padded = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return Asked({"input_ids": padded, "attention_mask": mask}, wanted, width)
