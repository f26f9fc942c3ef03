"""A decoder learns which of two answers people prefer, by direct preference optimisation (DPO).

    Rafailov, Sharma, Mitchell, Ermon, Manning and Finn, "Direct Preference Optimization: Your
    Language Model is Secretly a Reward Model", NeurIPS 2023, arXiv:2305.18290.

With pi the model, pi_ref the base without an adapter, x the prompt, y_w the chosen answer and y_l
the rejected one, an answer's reward is how much likelier training has made it,

    r(y) = beta (log pi(y | x) - log pi_ref(y | x)),        loss = -log sigma(r(y_w) - r(y_l)).

Of a client that starts from the global model of a later round, and of rules that merge updates into
the base, the reference is still the model that the run began with.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, ValidationError, model_validator
from torch import Tensor

from fedft.core.examples import Encoded, Examples, TokenExamples
from fedft.core.grouped import GroupedExamples, emptied
from fedft.core.metrics import METRICS
from fedft.core.strict import Table
from fedft.core.tasks.base import Reduction, Task
from fedft.core.tasks.columns import Column
from fedft.core.tasks.preference_rows import Unfit, pair_of, value_fault
from fedft.core.tasks.rows import RawRows
from fedft.core.text.asked import answering
from fedft.core.text.special_tokens import TextEncoder


class Objective(Table):
    """`[model] objective` of ``preference``.

    Attributes:
        beta: how dearly the model pays for leaving the reference.
        label_smoothing: how often pairs are taken to be labelled the wrong way round, of ``sigmoid``
            and ``robust``.
        loss: with z = r(y_w) - r(y_l) and e of label smoothing, ``sigmoid`` is
            -(1 - e) log sigma(z) - e log sigma(-z), DPO or with e > 0 its conservative form;
            ``robust`` is (-(1 - e) log sigma(z) + e log sigma(-z)) / (1 - 2 e), unbiased if that many
            are wrong (Chowdhury et al., arXiv:2403.00409); ``hinge`` is max(0, 1 - z).
    """

    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    loss: Literal["sigmoid", "robust", "hinge"] = "sigmoid"

    @model_validator(mode="after")
    def _read(self) -> Self:
        if self.label_smoothing and self.loss == "hinge":
            raise ValueError("label-smoothing is of the losses sigmoid and robust, not of hinge")
        return self


class Preference(Task):
    """Both answers are rows of the model, and their rewards are what is scored: [b, 2], chosen first.

    Accuracy is the share of pairs whose chosen answer has the greater reward; as many are a tie
    before anything is learnt, and count as wrong.
    """

    name = "preference"
    auto = "AutoModelForCausalLM"
    peft = "CAUSAL_LM"
    columns = (
        Column("chosen", value_fault),
        Column("rejected", value_fault),
        Column("prompt", value_fault, implied=True),
    )
    metrics = (METRICS["accuracy"], METRICS["margin"])
    head = False
    words = True
    causal = True
    each = 2
    refers = True

    def __init__(self, objective: Objective | None = None) -> None:
        self._objective = objective or Objective()

    def with_objective(self, table: Mapping[str, Any]) -> Task:
        found = copy.copy(self)  # with whatever metrics it has
        try:
            found._objective = Objective.model_validate(dict(table))
            return found
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(("objective", *map(str, first["loc"])))
            raise ValueError(f"{where}: {first['msg']}") from error

    @property
    def predicts(self) -> frozenset[str]:
        """The rewards of both answers."""
        return frozenset({"pair"})

    # ------------------------------------------------------------------------------- data

    def fault(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        try:
            pair_of(row["prompt"], row["chosen"], row["rejected"])
        except Unfit as error:
            return error.key, error.reason
        return None

    def remarks(self, rows: RawRows) -> Sequence[str]:
        spoken = isinstance(next(iter(rows.values["chosen"]), None), list | tuple)
        form = "conversations" if spoken else "texts"
        if all(prompt is None for prompt in rows.values["prompt"]):
            return [f"the prompt is what chosen and rejected, {form}, have in common"]
        return [f"rows are a prompt and two answers, chosen and rejected, {form}"]

    def encode(self, rows: RawRows, encoder: Any, max_length: int) -> Encoded[Examples]:
        names = ("prompt", "chosen", "rejected")
        columns = (rows.values[name] for name in names)
        pairs = [pair_of(*values) for values in zip(*columns, strict=True)]
        asked = [pair.prompt for pair in pairs for _ in range(2)]
        answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
        found = answering(asked, answers, TextEncoder.of(encoder), max_length)
        unfit = (found.examples.lengths == 0).reshape(-1, 2).any(1)
        faults = {row // 2: told for row, told in found.faults.items()}
        for row in np.flatnonzero(~unfit).tolist():
            chosen, rejected = (_answer(found.examples, 2 * row + k) for k in range(2))
            if np.array_equal(chosen, rejected):
                unfit[row] = True
                faults[row] = f"in data.max-length = {max_length} both answers are the same tokens"
        examples = emptied(found.examples, unfit.repeat(2))
        cut: NDArray[np.bool_] = found.cut.reshape(-1, 2).max(1, initial=False)
        return Encoded(GroupedExamples(examples, 2), cut, faults)

    # ------------------------------------------------------------------------------- loss

    def targets(self, labels: Tensor) -> tuple[Tensor | None, Tensor]:
        """Token t predicts label t + 1, as of a causal language model."""
        positions = torch.arange(labels.numel(), device=labels.device).view_as(labels)
        return positions[:, :-1].flatten(), labels[:, 1:].flatten()

    def referred(self, own: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards [b, 2], and which answer was chosen: the first. [b]"""
        rewards = self._objective.beta * (own - reference).view(-1, 2)
        return rewards, torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device)

    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
        ahead = outputs[:, 0] - outputs[:, 1]
        kind, wrong = self._objective.loss, self._objective.label_smoothing
        right, flipped = -F.logsigmoid(ahead), -F.logsigmoid(-ahead)
        if kind == "hinge":
            each = F.relu(1 - ahead)
        elif kind == "robust":
            each = ((1 - wrong) * right - wrong * flipped) / (1 - 2 * wrong)
        else:
            each = (1 - wrong) * right + wrong * flipped
        return each if reduction == "none" else each.mean()

    def predicted(self, outputs: Tensor) -> Tensor:
        return (outputs[:, 0] <= outputs[:, 1]).long()


def _answer(rows: TokenExamples, row: int) -> NDArray[np.int32]:
    """The tokens of a row's answer."""
    assert rows.answers is not None
    return rows.ids[rows.offsets[row] + rows.answers[row] : rows.offsets[row + 1]]
