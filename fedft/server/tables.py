"""The tables of a configuration that are the server's business: fleet, rounds, engine, trackers."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    model_validator,
)

from fedft.core.errors import ConfigError
from fedft.core.plugins import trusted
from fedft.core.spec import (
    AttackSpec,
    Precision,
    Table,
)
from fedft.core.wire.compress import FP32, AnyCompressor, spelled
from fedft.server.fleet import (
    Device,
    Numbers,
    WholeNumbers,
    check_devices,
    whole,
)
from fedft.trackers import found

MOST_CLIENTS = 100_000_000
"""Registered sites of a simulation: each takes eight bytes and more, wherever the run is looked at."""


class FleetSpec(Table):
    """`[fleet]`: who takes part, on what devices.

    A key of numbers is a list, dealt out by seed, or a distribution to draw from by seed, such as
    ``{ kind = "log-uniform", low = 2, high = 20 }``; see :class:`~fedft.server.fleet.Distribution`. Rates
    and availability turn the simulated clock on: see docs/fleets.md.

    Attributes:
        clients: registered sites of a simulation.
        ranks: LoRA ranks of the sites; empty gives every site `[lora] rank`.
        memory_budgets_mib: memory that sites grant to training, in MiB.
        model_shares: in place of that, what a share of the transformer blocks (or of their halves,
            see `[pruning] granularity`) takes, dealt out by seed; at least one.
        speeds: examples that sites train on in a second.
        up_mbps, down_mbps: bandwidth of the sites, in megabits a second.
        devices: a CSV of devices, or its rows, in place of all of the above; see
            :mod:`fedft.server.fleet`.
        availability: a CSV of the times at which sites can be reached; see
            :mod:`fedft.server.availability`.
        period_s: seconds after which that file repeats; None: never.
        attack: sites that lie, see :class:`~fedft.core.spec.AttackSpec`; None of none.
    """

    clients: Annotated[int, Field(gt=0, le=MOST_CLIENTS)] = 100
    ranks: WholeNumbers = ()
    memory_budgets_mib: Numbers = ()
    model_shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    speeds: Numbers = ()
    up_mbps: Numbers = ()
    down_mbps: Numbers = ()
    devices: tuple[Device, ...] = ()
    availability: str | None = None
    period_s: PositiveFloat | None = None
    attack: AttackSpec | None = None

    @model_validator(mode="after")
    def _unambiguous(self) -> "FleetSpec":
        check_devices(self.devices)
        lists = ("ranks", "memory_budgets_mib", "speeds", "up_mbps", "down_mbps")
        both = [name.replace("_", "-") for name in lists if self.devices and getattr(self, name)]
        if both:
            raise ValueError(f"devices say it all: {', '.join(both)} cannot stand beside them")
        if self.model_shares and (self.devices or self.memory_budgets_mib):
            raise ValueError("model-shares are budgets too: give either these or MiB")
        if self.period_s is not None and self.availability is None:
            raise ValueError("period-s is of the file of availability, and there is none")
        return self

    @property
    def rank_choices(self) -> tuple[int, ...]:
        """Every rank that a site can have; empty where all have the run's own."""
        if self.devices:
            return tuple(device.rank for device in self.devices if device.rank is not None)
        return whole(self.ranks)

    @property
    def timed(self) -> bool:
        """Whether there is a simulated clock."""
        rates = any(d.samples_per_s or d.up_mbps or d.down_mbps for d in self.devices)
        return bool(rates or self.speeds or self.up_mbps or self.down_mbps or self.availability)


class RoundsSpec(Table):
    """`[rounds]`: how many, of whom, and when a round is good enough.

    Attributes:
        count: rounds to complete.
        per_round: sites sampled each round.
        quorum: usable replies without which the model stays as it is; None is 70 % of ``per_round``.
        deadline_s: seconds after which a round closes with what has arrived, on the simulated clock
            where the fleet has one, else from when the last round is committed. None waits for all
            in a simulation; real clients are given what the slowest of them would need, see
            :mod:`fedft.server.deadline`.
        gather_s: of real clients: seconds for which a round waits for more of them, once as many as
            the quorum are connected.
        spares: sites asked beyond ``per_round``; the round closes without the slowest. Needs the
            simulated clock.
        retries: further tries with a fresh cohort before the run pauses.
        evaluate_every: rounds between evaluations; the last round is always evaluated.
        patience: evaluations without improvement after which the run ends early; None never does.
        keep_checkpoints: number of checkpoints to keep.
        keep_adapters: export an adapter at every evaluation, not only at the best and the last.
        spectrum: record the singular values of the mean update, layer by layer, at every evaluation.
    """

    count: PositiveInt = 20
    per_round: PositiveInt = 10
    quorum: PositiveInt | None = None
    deadline_s: PositiveFloat | None = None
    gather_s: Annotated[float, Field(ge=0)] = 60.0
    spares: Annotated[int, Field(ge=0)] = 0
    retries: Annotated[int, Field(ge=0)] = 2
    evaluate_every: PositiveInt = 5
    patience: PositiveInt | None = None
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    keep_adapters: bool = False
    spectrum: bool = False

    @property
    def needed(self) -> int:
        """Usable replies that make a round."""
        return self.quorum if self.quorum is not None else max(1, -(-7 * self.per_round // 10))


class EngineSpec(Table):
    """`[engine]`: the machinery of a simulation. Changes speed, not results, but for ``precision``,
    ``threads``, ``cohort`` and ``compressor``, which change the last bits and are recorded with the run.

    Attributes:
        backend: ``ray`` for worker processes on Ray, ``processes`` for workers that are forked on
            this machine after their imports, ``inline`` for this process.
        workers: worker processes; None is one a core.
        threads: threads a worker.
        gpus_per_worker: may be a fraction.
        ray_address: an existing Ray cluster to join, or None to start one on this machine.
        cohort: sites trained in one pass; ``auto`` fills a token budget; 1 is the plain PEFT loop.
        precision: of the frozen base; ``auto`` takes what this machine does fast.
        gradient_checkpointing: keep of every block what enters it and run it again in the backward
            pass: less memory, up to half more time, the same numbers. Not with ``[training] dp``.
        compressor: how tensors are encoded between server and clients, a name or a table with a
            ``name`` and settings: ``fp32`` and ``bf16`` in both directions, ``int8`` for what
            clients send. ``wire`` is its old name, which is read for one more release.
        max_update_norm: largest norm of a site's change that is accepted; None accepts any.
        verify: at the end of a run, load the exported adapter in stock peft and compare its scores
            with the run's own on a few test rows; see :mod:`fedft.server.verify`.
    """

    backend: Literal["ray", "processes", "inline"] = "ray"
    workers: Annotated[int, Field(gt=0, le=1024)] | None = None
    threads: Annotated[int, Field(gt=0, le=1024)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    ray_address: str | None = None
    cohort: PositiveInt | Literal["auto"] = "auto"
    precision: Precision | Literal["auto"] = "fp32"
    gradient_checkpointing: bool = False
    compressor: AnyCompressor = FP32
    max_update_norm: PositiveFloat | None = None
    verify: bool = True

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, table: Any) -> Any:
        """``wire``, as ``compressor`` was called; it may be set over a configuration that has both."""
        if not isinstance(table, Mapping) or "wire" not in table:
            return table
        given = dict(cast(Mapping[str, Any], table))
        wire = given.pop("wire")
        if given.get("compressor", wire) not in (wire, spelled(FP32)):
            raise ValueError(
                f"[engine] wire = {wire!r} is the old name of compressor, which is "
                f"{given['compressor']!r} here; leave wire out"
            )
        return {**given, "compressor": wire}

    @model_validator(mode="after")
    def _on_ray_only(self) -> "EngineSpec":
        if self.backend == "processes" and (self.gpus_per_worker or self.ray_address is not None):
            raise ValueError(
                'backend = "processes" knows no GPUs and no other machine: '
                'gpus-per-worker and ray-address need "ray"'
            )
        return self


class TrackSpec(Table):
    """`[track]`: who is told of a run beside its directory. Changes no result.

    Attributes:
        trackers: names, see :data:`fedft.trackers.TRACKERS`, or ``package.module:Class``;
            ``tensorboard`` needs fedft[trackers].
    """

    trackers: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _known(self, info: ValidationInfo) -> "TrackSpec":
        for name in self.trackers:
            try:
                found(name, trusted(info.context))
            except ConfigError as error:
                raise ValueError(f"{error.what}; {error.fix}") from error
            if self.trackers.count(name) > 1:
                raise ValueError(f"the tracker {name} is named twice")
        return self
