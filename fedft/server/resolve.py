"""``auto`` values as what they come to on this machine."""

from typing import Literal

import torch

from fedft.core.spec import Precision
from fedft.core.tasks import task_of
from fedft.server.config import RunConfig
from fedft.server.privacy import resolved_privacy

COHORT_TOKENS = 1536
"""Tokens that one pass of the cohort engine is filled with when ``engine.cohort = "auto"``: where
its speed levels off on a CPU, as benchmarks/cohort.py shows."""


def resolved(config: RunConfig) -> RunConfig:
    """``auto`` values replaced by what they come to on this machine; runs again as it is."""
    engine = config.engine
    precision = concrete(engine.precision, gpu=engine.gpus_per_worker > 0)
    cohort = cohort_size(config) if engine.cohort == "auto" else engine.cohort
    engine = engine.model_copy(update={"precision": precision, "cohort": cohort})
    return resolved_privacy(config.model_copy(update={"engine": engine}))


def concrete(precision: Precision | Literal["auto"], *, gpu: bool = False) -> Precision:
    """``auto`` as what this machine does fast: TF32 on a GPU, bfloat16 where the processor has it."""
    if precision != "auto":
        return precision
    if gpu:
        return "tf32"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("amx_bf16") or able.get("avx512_bf16") else "fp32"


def cohort_size(config: RunConfig) -> int:
    """Sites a pass: a function of the configuration alone, never of the workers.

    Fills about :data:`COHORT_TOKENS`, counting a row as an eighth of the longest allowed, which is
    what short texts come to. A round takes an even number of passes, of equal size as far as that
    goes: two workers then have the same to do, and so have four where there are as many passes.
    """
    if config.training.dp is not None:
        return 1  # DP-SGD takes gradients example by example, in the plain loop
    if config.one_by_one:
        return 1
    row = max(1, config.data.max_length // 8) * task_of(config.model.task).each
    fits = max(1, COHORT_TOKENS // (row * config.training.batch_size))
    pairs = -(-config.rounds.per_round // (2 * fits))
    return -(-config.rounds.per_round // (2 * pairs))
