"""Sites that lie, for experiments: what a poisoned update is, and who sends one.

In simulation only, and only where ``[fleet] attack`` asks for it. A lying site trains as the others
do; what it sends is another point than where it arrived. With D = theta - theta_start over the
tensors it sends,

    sign-flip   theta_start - scale D
    collude     theta_start + scale ||D|| v,  v one random unit vector, the same for all liars of a round

Who lies and in which direction are functions of the run's seed, so that the attack is the same on
every backend and under every rule.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from fedft.core import seeds
from fedft.core.spec import TaskSpec
from fedft.core.types import Records, TrainPlan


def sent_by(
    task: TaskSpec, index: int, plan: TrainPlan, tensors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """What a site sends: the truth, or its lie.

    Args:
        task: of the run.
        index: of the site.
        plan: what it was asked.
        tensors: what it should send, PEFT name → tensor.
    """
    attack = task.attack
    if attack is None or index not in liars(task.seed, task.clients, attack.share):
        return tensors
    start = plan.start.tensors()
    change = {name: tensor - start[name] for name, tensor in tensors.items()}
    if attack.kind == "sign-flip":
        return {name: start[name] - attack.scale * d for name, d in change.items()}
    common = _common(task.seed, plan.round, change)
    return {name: start[name] + attack.scale * d for name, d in common.items()}


def records_sent_by(task: TaskSpec, index: int, plan: TrainPlan, records: Records) -> Records:
    """What a site sends beside the adapter: the truth, or its lie.

    A record has no start: the lie is of the record itself, in place of the change. Arguments as for
    :func:`sent_by`.
    """
    attack = task.attack
    if attack is None or index not in liars(task.seed, task.clients, attack.share):
        return records
    lies = (
        records
        if attack.kind == "sign-flip"
        else {name: _common(task.seed, plan.round, record) for name, record in records.items()}
    )
    sign = -1 if attack.kind == "sign-flip" else 1
    return {
        name: {n: sign * attack.scale * t for n, t in record.items()}
        for name, record in lies.items()
    }


@lru_cache(maxsize=4)
def liars(seed: int, clients: int, share: float) -> frozenset[int]:
    """Indices of the sites that lie: ``round(share * clients)`` of them, drawn by seed."""
    generator = seeds.numpy_generator(seed, "attack")
    drawn = generator.choice(clients, size=round(share * clients), replace=False)
    return frozenset(int(index) for index in drawn)


def _common(seed: int, round_: int, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vector of the norm of ``change``, in the direction that all liars of the round take."""
    generator = seeds.torch_generator(seed, "attack", round_)
    v = {name: torch.randn(d.shape, generator=generator) for name, d in change.items()}
    length = _norm(change) / _norm(v)
    return {name: length * d for name, d in v.items()}


def _norm(vector: Mapping[str, Tensor]) -> float:
    return sum(float(d.double().square().sum()) for d in vector.values()) ** 0.5
