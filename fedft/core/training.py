"""How a client optimises: the plain data behind the `[training]` table, as a plan carries it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from fedft.core import optimizers
from fedft.core.schedules import Schedule

ClassWeights = Literal["balanced"] | Mapping[str, float] | tuple[float, ...]
"""``balanced``, by each client's own rows; numbers by class name; or, once a client has looked at
its rows, a number for each class, in their order."""


@dataclass(frozen=True)
class LocalTraining:
    """How a site optimises, in the vocabulary of optimisation; the `[training]` table.

    Attributes:
        epochs: passes over the site's examples; ignored where ``steps`` is set.
        steps: optimiser steps, or None to go by epochs.
        batch_size: examples of a forward pass; of a step, too, unless it accumulates several.
        lr: learning rate; where there is a ``schedule``, what its factor multiplies.
        optimizer: a name in :data:`fedft.core.optimizers.OPTIMIZERS`; its state starts anew each round.
        momentum: of SGD, and of others that have one.
        weight_decay: decoupled for AdamW, added to the gradient for SGD.
        clip_norm: largest gradient norm over all trained tensors of the site; None clips nothing.
        proximal_mu: FedProx's mu: adds mu / 2 * ||theta - theta_start||^2 to the loss.
        tail_penalty: HetLoRA's lambda: adds lambda * sum_modules ||B[:, k:]||_F ||A[k:, :]||_F to
            the loss, k = floor(``tail_keep`` * r).
        tail_keep: HetLoRA's gamma, the share of the rank that is not penalised.
        dp_noise: noise multiplier of DP-SGD; 0 trains without. Batches are then Poisson samples of
            mean size ``batch_size``, and ``clip_norm`` is not used.
        dp_clip: DP-SGD's bound on the gradient of one example.
        asked: names of fields that a rule insists on where they equal the defaults above; see
            :meth:`asking`. Of no meaning in the `[training]` table.
        accumulate: forward passes whose gradients make up one step.
        options: of the optimiser, by torch's names.
        schedule: of the learning rate; None keeps it constant.
        label_smoothing: share of a label that is spread evenly over all classes, in training.
        class_weights: by which the loss of an item counts, in training; None counts all alike.
        neftune_alpha: of NEFTune's noise on the embeddings, in training; 0 adds none.
    """

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 8
    lr: float = 5e-3
    optimizer: str = "adamw"
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    proximal_mu: float = 0.0
    tail_penalty: float = 0.0
    tail_keep: float = 1.0
    dp_noise: float = 0.0
    dp_clip: float = 1.0
    asked: tuple[str, ...] = ()
    accumulate: int = 1
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    schedule: Schedule | None = None
    label_smoothing: float = 0.0
    class_weights: ClassWeights | None = None
    neftune_alpha: float = 0.0

    @property
    def step_rows(self) -> int:
        """Examples of an optimiser step."""
        return self.batch_size * self.accumulate

    def asking(self, **values: Any) -> "LocalTraining":
        """With these fields asked for, whatever their values: a rule's side of :meth:`overlaid`.

        ``LocalTraining().asking(epochs=1)`` makes every site train one epoch, whatever the table
        says; ``LocalTraining(epochs=1)`` is equal to the defaults and asks for nothing.
        """
        return replace(self, **values, asked=tuple(sorted({*self.asked, *values})))

    def overlaid(self, rule: "LocalTraining") -> "LocalTraining":
        """These settings, but with those of ``rule`` that it asks for, or that are not the defaults.

        The round calls it as ``configured.overlaid(plan.training)``: a rule adds its penalty to
        the `[training]` table without knowing the table.
        """
        default = LocalTraining()
        changed = {
            f.name: getattr(rule, f.name)
            for f in fields(self)
            if f.name in rule.asked or getattr(rule, f.name) != getattr(default, f.name)
        }
        changed["asked"] = ()
        return replace(self, **changed)

    def check(self) -> None:
        """Refuse what contradicts itself, or what torch or transformers refuses.

        Raises:
            ValueError: naming the key, as it stands in the `[training]` table.
        """
        optimizers.check(self)
        if self.schedule is not None:
            self.schedule.check(self.lr)
        for name, weight in self._by_name().items():
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"class-weights: {name[:100]!r} counts {weight:g}; a number above 0 is expected"
                )
        if self.dp_noise and self.accumulate > 1:
            raise ValueError(
                f"accumulate = {self.accumulate}: dp draws every step's batch anew and accounts for it; "
                "leave accumulate out, and batch-size is the mean size of a step"
            )
        if self.dp_noise and self.class_weights is not None:
            raise ValueError(
                "class-weights: dp takes every example's gradient by itself, where a weight relative to "
                "others has no meaning; leave one of the two out"
            )

    def _by_name(self) -> Mapping[str, float]:
        given = self.class_weights
        return given if isinstance(given, Mapping) else {}

    def rates(self, round_: int, steps: int) -> Callable[[int], float] | None:
        """The learning rate by step within a round, from 0 on; None where it is constant.

        Args:
            round_: from 1 on.
            steps: that the client takes in a round.
        """
        return None if self.schedule is None else self.schedule.rates(self.lr, round_, steps)

    # ── the wire ──────────────────────────────────────────────────────────────────────────────

    def to_fields(self) -> dict[str, Any]:
        """As a site is told: JSON data, without ``asked``, which is laid over the table by then.

        Keys that older versions do not know are left out at their defaults.
        """
        default, told = LocalTraining(), asdict(self)
        del told["asked"]
        for name in _LATER:
            if getattr(self, name) == getattr(default, name):
                del told[name]
        return told

    @classmethod
    def of_fields(cls, told: Mapping[str, Any]) -> "LocalTraining":
        """What :meth:`to_fields` made.

        Raises:
            TypeError: it has other keys.
        """
        own = dict(told)
        if (schedule := own.get("schedule")) is not None:
            own["schedule"] = Schedule(**schedule)
        return cls(**own)


_LATER = (
    "accumulate",
    "options",
    "schedule",
    "label_smoothing",
    "class_weights",
    "neftune_alpha",
)
"""Fields that came after the first version of the wire."""
