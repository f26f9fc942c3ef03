"""Learning-rate schedules, which are transformers' own.

A schedule is a factor of the learning rate by step, as ``transformers.get_scheduler`` makes it. Over a
run, the position of a client's step is counted in its own steps: in round t of T, step i of n stands at
(t - 1) n + i of T n. It is a function of the plan and the client's rows, so a run that is resumed goes
on where it was, and it does not matter which rounds a client took part in.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import torch

from fedft.core.names import hint

Over = Literal["run", "round"]

_STEPLESS = {
    "reduce_lr_on_plateau": "it needs scores between steps",
    "greedy": "it needs scores between steps",
}
"""Schedules of transformers that are no function of the step."""


_OURS = frozenset({"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"})
"""Arguments that are ours to give."""


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes over a client's steps.

    Attributes:
        name: of transformers, such as ``linear`` or ``cosine_with_min_lr``.
        warmup_steps: steps over which the rate rises from zero.
        warmup_ratio: the same as a share of all steps, rounded up; one of the two is zero.
        over: whether it goes over the whole run, or anew in each round.
        options: of the schedule, by transformers' names.
        rounds: of the run.
    """

    name: str
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    over: Over = "run"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rounds: int = 1

    def check(self, lr: float) -> None:
        """Refuse what transformers does not know.

        Raises:
            ValueError: naming the value and what is possible.
        """
        from transformers.trainer_utils import SchedulerType

        names = [kind.value for kind in SchedulerType if kind.value not in _STEPLESS]
        if why := _STEPLESS.get(self.name):
            raise ValueError(f"schedule = {self.name!r} is no function of the step: {why}")
        if self.name not in names:
            raise ValueError(f"schedule = {self.name!r} is none of {', '.join(names)}")
        self._check_options()
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                "schedule: warmup-steps and warmup-ratio say the same; give one of them"
            )
        if self.name == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ValueError('schedule = "constant" has no warm-up; write "constant_with_warmup"')
        total = max(self.warmup_steps + 2, 4)
        factor = self._factor(lr, total)
        try:
            values = [float(factor(at)) for at in (0, 1, total // 2, total)]
        except (ArithmeticError, ValueError, TypeError) as error:
            raise ValueError(f"schedule = {self.name!r}: {error}") from error
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError(
                f"schedule = {self.name!r} gives a learning rate that is negative or no number; check its "
                "options"
            )

    def rates(self, lr: float, round_: int, steps: int) -> Callable[[int], float]:
        """The learning rate of each step of a round.

        Args:
            lr: that the factor multiplies.
            round_: from 1 on; of an asynchronous rule the version that the client starts from, and 1.
            steps: that the client takes in every round.

        Returns:
            Step within the round, from 0 on → learning rate.
        """
        whole = self.over == "run"
        before = (max(round_, 1) - 1) * steps if whole else 0
        total = max(1, self.rounds * steps if whole else steps)
        factor = self._factor(lr, total)
        # Some schedules rise again behind their end.
        return lambda step: lr * float(factor(min(before + step, total)))

    def _factor(self, lr: float, total: int) -> Callable[[int], float]:
        library: Any = import_module("transformers.optimization")
        warmup = self.warmup_steps or math.ceil(total * self.warmup_ratio)
        # Some schedules read the rate off the optimiser; this one trains nothing.
        bearer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        try:
            made = library.get_scheduler(
                self.name,
                bearer,
                num_warmup_steps=warmup,
                num_training_steps=total,
                scheduler_specific_kwargs=dict(self.options),
            )
        except (ArithmeticError, ValueError, TypeError) as error:
            said = str(error).rpartition("() ")[2]
            raise ValueError(f"schedule = {self.name!r}: {said}") from error
        return made.lr_lambdas[0]

    def _check_options(self) -> None:
        library: Any = import_module("transformers.optimization")
        function = library.TYPE_TO_SCHEDULER_FUNCTION[self.name]
        known = [key for key in inspect.signature(function).parameters if key not in _OURS]
        for key in self.options:
            if key not in known:
                words = ["warmup_steps", "warmup_ratio", "over", *known]
                raise ValueError(
                    f"schedule = {self.name!r} has no option {key!r}; {hint(key, words)}"
                )
