"""A trainer of one's own in place of the loop: transformers', TRL's, Lightning's, anybody's.

The trainer gets a copy of the network around the same frozen weights. Whatever it does to modules,
hooks, modes or the configuration of its copy is gone with the copy; what it may change, the tensors
that the plan trains, is read back from it. Everything else has to be as it was, and is looked at.

Evaluation, and the trial before the first round, are the loop's.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedft.clients.engines.base import Trained
from fedft.clients.engines.copied import Copied, Fingerprints, fingerprints, some
from fedft.clients.engines.loop import LoopEngine
from fedft.clients.engines.own_code import called, failed, guarded
from fedft.core import seeds
from fedft.core.drawn import check_time
from fedft.core.errors import MismatchError
from fedft.core.metrics import Tally
from fedft.core.models import Base
from fedft.core.sublayers import Layer
from fedft.core.trainers import Making, TrainerSettings, beyond, trainer_of
from fedft.core.types import Adapter, Batch, Delta, TrainPlan, clone


class OwnRows(Protocol):
    """What a client brings to its own trainer; see :class:`fedft.clients.own_rows.ClientRows`."""

    @property
    def max_length(self) -> int:
        """Longest row, in tokens."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the run's classes."""
        ...

    def of(self, client: str) -> list[dict[str, Any]]:
        """The rows that a client trains on, with all columns of its file."""
        ...

    def tokenizer(self) -> Any:
        """A new copy of the model's tokenizer."""
        ...


class TrainerEngine:
    """Has clients trained by a function of the user's, one after another.

    Args:
        loop: the plain loop of the family, with the base in it.
        name: of the trainer.
        rows: of the clients here.
        reload: the frozen network once more, as it was loaded.
    """

    def __init__(
        self, loop: LoopEngine, name: str, rows: OwnRows, reload: Callable[[], Base]
    ) -> None:
        self.base = loop.base
        self.loop = loop
        self._name = name
        self._make = trainer_of(name)
        self._rows = rows
        self._reload = reload

    def train(
        self, plans: Sequence[TrainPlan], batches: Sequence[Sequence[Batch]]
    ) -> list[Trained]:
        """Each plan by the trainer; of the batches nothing is read.

        Raises:
            UpdateRejected: the trainer failed, or did what its result cannot be used after.
            MismatchError: a plan asks for what no trainer of one's own does.
        """
        return [self._train(plan) for plan in plans]

    def evaluate(
        self,
        adapter: Adapter,
        delta: Delta,
        batches: Iterable[Batch],
        layers: tuple[Layer, ...] | None = None,
    ) -> Tally:
        """Score one adapter; see :class:`fedft.clients.engines.base.Engine`."""
        return self.loop.evaluate(adapter, delta, batches, layers)

    def reference(self, batch: Batch) -> Tensor:
        """See :class:`fedft.clients.engines.base.Engine`."""
        return self.loop.reference(batch)

    def bare(self) -> AbstractContextManager[nn.Module]:
        """See :class:`fedft.clients.engines.base.Engine`."""
        return self.loop.bare()

    def _train(self, plan: TrainPlan) -> Trained:
        if (what := beyond(plan)) is not None:
            raise MismatchError(
                f"the plan for {plan.site} asks for {what}, which the trainer {self._name} would not do"
            )
        rows, tokenizer = self._rows.of(plan.site), self._rows.tokenizer()
        seed = seeds.derive(plan.seed, "trainer", plan.round, plan.site) % 2**32
        with self.base.holding(None, plan.delta):
            before = fingerprints(self.loop.frozen())
            own = self.loop.copied(plan)
            with guarded(self._name, _file(self._make), seed, self.base.device) as folder:
                settings = TrainerSettings(
                    client=plan.site,
                    round=plan.round,
                    seed=seed,
                    training=plan.training,
                    max_length=self._rows.max_length,
                    output_folder=folder,
                    tokenizer=tokenizer,
                    device=str(self.base.device),
                    classes=self._rows.classes,
                )
                made = self._make(own.model, rows, settings)
                result = called(made, self._name)()
            self._check_base(before)
        check_time()
        return Trained(self._read(own, plan), self._metrics(result))

    def _check_base(self, before: Fingerprints) -> None:
        after = fingerprints(self.loop.frozen())
        changed = [name for name, found in after.items() if found != before[name]]
        if not changed:
            return
        self._restore(changed)
        raise failed(
            f"the trainer {self._name} changed {some(changed)} of the frozen base, which all clients "
            "share; it is loaded anew"
        )

    def _restore(self, changed: Sequence[str]) -> None:
        self.base.shift({})
        weights = self.loop.frozen()
        fresh = dict(self._reload().model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name in changed:
                weights[name].copy_(fresh[_unwrapped(name)])

    def _read(self, own: Copied, plan: TrainPlan) -> Adapter:
        """The adapter after training: what the plan trains, and nothing else may have moved."""
        present, start = own.found(self._name), plan.start.tensors()
        for name, old in start.items():
            new = present[name]
            if new.shape != old.shape:
                raise failed(
                    f"the trainer {self._name} left {name} in the shape {list(new.shape)}, and it was "
                    f"{list(old.shape)}"
                )
            if not bool(new.isfinite().all()):
                raise failed(f"the trainer {self._name} left NaN or Inf in {name}")
        found = {n: clone(present[n]).to(start[n].dtype) for n in start}
        moved = [n for n, new in found.items() if not torch.equal(new, start[n])]
        if foreign := [n for n in moved if not plan.trains(n)]:
            raise failed(
                f"the trainer {self._name} changed {some(foreign)}, which the plan of this round leaves "
                "as it is: requires_grad was false"
            )
        if not moved:
            raise failed(
                f"the trainer {self._name} trained nothing: every tensor is as it was; does its "
                "optimiser have the parameters with requires_grad of the model that it was given?"
            )
        return plan.start.replaced({n: found[n] for n in moved})

    def _metrics(self, result: object) -> dict[str, float]:
        """What train() says of itself, as transformers' ``TrainOutput`` names it."""
        said = {"loss": "training_loss", "steps": "global_step"}
        found: dict[str, float] = {}
        for name, attribute in said.items():
            value = getattr(result, attribute, None)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[name] = float(value)
        if bad := [said[n] for n, value in found.items() if not math.isfinite(value)]:
            raise failed(f"the trainer {self._name} says {bad[0]} = {getattr(result, bad[0])}")
        return found


def _unwrapped(name: str) -> str:
    """The name of a frozen weight in the model before peft wrapped it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _file(make: Making) -> str | None:
    """Where the user's function stands."""
    try:
        return inspect.getsourcefile(inspect.unwrap(make))
    except TypeError:  # of code in C
        return None
