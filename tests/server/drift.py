"""A term of tests that counts: what travels, and what stays, can be told by hand.

With c_k the trainings of client k so far, this one counted, and a what came down,

    own-drift <- c_k              stays at the client
    drift      = c_k + a / 2      travels up
    anchor    <- mean of drift    by examples; a of the next round

in every entry of every tensor that trains.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, ClassVar, Literal

import pytest
import torch

from fedft.clients import resident
from fedft.clients.engines.base import Engine, Trained
from fedft.core import terms
from fedft.core.means import RunningMean
from fedft.core.terms import Term, entries
from fedft.core.types import Batch, ClientUpdate, Records, ServerState, Site, TrainPlan
from fedft.strategies import FedAvgLoRA
from fedft.strategies.base import mean_of


class Drift(Term):
    kind: Literal["drift"] = "drift"
    receives: ClassVar[frozenset[str]] = frozenset({"anchor"})
    sends: ClassVar[frozenset[str]] = frozenset({"drift"})
    keeps: ClassVar[frozenset[str]] = frozenset({"own-drift"})


def records_after(plan: TrainPlan) -> Records:
    """What training leaves of the records that a plan came with."""
    if not plan.terms:
        return {}
    kept, anchor = plan.records.get("own-drift", {}), plan.records["anchor"]
    own = {
        name: kept.get(name, torch.zeros(shape)) + 1
        for name, shape in plan.schema("keeps")["own-drift"].items()
    }
    return {"own-drift": own, "drift": {n: t + anchor[n] / 2 for n, t in own.items()}}


class Counting:
    """An engine, and the term beside it."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.base = engine, engine.base

    def train(
        self, plans: Sequence[TrainPlan], batches: Sequence[Sequence[Batch]]
    ) -> list[Trained]:
        plain = [replace(plan, terms=(), records={}) for plan in plans]
        trained = self._engine.train(plain, batches)
        return [
            replace(one, records=records_after(plan))
            for one, plan in zip(trained, plans, strict=True)
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def at_clients(patch: pytest.MonkeyPatch) -> None:
    """Make clients of this process, and its server, know the term."""
    patch.setattr(terms, "TERMS", (*terms.TERMS, Drift))
    made = resident._engine  # pyright: ignore[reportPrivateUsage]
    patch.setattr(resident, "_engine", wraps(made)(lambda *rest: Counting(made(*rest))))


def at_server(patch: pytest.MonkeyPatch) -> None:
    """Make FedAvg-LoRA ask for the term, and keep the anchor in its slots."""

    def plan(self: FedAvgLoRA, state: ServerState, site: Site) -> TrainPlan:
        own = TrainPlan(state.adapter, state.delta, terms=(Drift(),))
        zeros = {n: torch.zeros(shape) for n, shape in own.schema("receives")["anchor"].items()}
        return replace(own, records={"anchor": state.record("anchor") or zeros})

    def combine(
        self: FedAvgLoRA, state: ServerState, updates: Sequence[ClientUpdate]
    ) -> ServerState:
        mean = RunningMean()
        for update in updates:
            mean.add(update.records["drift"], update.examples)
        slots = {**state.slots, **entries("anchor", mean.tensors())}
        return replace(state, adapter=state.adapter.replaced(mean_of(updates)), slots=slots)

    patch.setattr(FedAvgLoRA, "plan", plan)
    patch.setattr(FedAvgLoRA, "combine", combine)


def twin(lines: Iterable[Mapping[str, Any]]) -> tuple[float, dict[str, int]]:
    """The anchor and every client's count after these lines of ``clients.jsonl``, in float64."""
    anchor, counts = 0.0, dict[str, int]()
    rounds: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "train" and line["status"] == "ok":
            rounds.setdefault(line["round"], []).append(line)
    for _, counted in sorted(rounds.items()):
        for line in counted:
            counts[line["site"]] = counts.get(line["site"], 0) + 1
        weights = [line["examples"] for line in counted]
        values = [counts[line["site"]] + anchor / 2 for line in counted]
        anchor = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    return anchor, counts
