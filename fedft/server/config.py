"""The configuration of a run: one TOML file, validated whole before anything starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tomli_w
from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    model_validator,
)

from fedft.core.adapters import family_of
from fedft.core.errors import ConfigError
from fedft.core.plugins import trusted
from fedft.core.spec import (
    AttackSpec,
    DataSpec,
    LoraSpec,
    ModelSpec,
    Precision,
    Table,
    TaskSpec,
    TrainingSpec,
)
from fedft.core.tasks import task_of
from fedft.core.types import Part
from fedft.core.wire.compress import FP32, AnyCompressor, spelled
from fedft.server.availability import Availability, read_availability
from fedft.server.fleet import (
    Device,
    Fleet,
    Numbers,
    WholeNumbers,
    check_devices,
    whole,
)
from fedft.server.measuring import EvaluationSpec
from fedft.server.pruning import PruningSpec, unprunable
from fedft.strategies import (
    AnyStrategy,
    CentralDP,
    FedAvgLoRA,
    RunFacts,
    Strategy,
    check_init,
    check_method,
    check_ranks,
)
from fedft.strategies.beside import check_beside, first_plan
from fedft.strategies.combinator import Combinator
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


class RunConfig(Table):
    """A whole run. Every key has its default in code; :meth:`to_toml` writes all of them out.

    Attributes:
        seed: of everything that is drawn: the partition, the first adapter, cohorts and batches.
    """

    model: ModelSpec = ModelSpec()
    lora: LoraSpec = LoraSpec()
    data: DataSpec = DataSpec()
    fleet: FleetSpec = FleetSpec()
    rounds: RoundsSpec = RoundsSpec()
    training: TrainingSpec = TrainingSpec()
    strategy: AnyStrategy = FedAvgLoRA()
    pruning: PruningSpec = PruningSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    engine: EngineSpec = EngineSpec()
    track: TrackSpec = TrackSpec()
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        family_of(self.lora).check(self.lora)
        rounds, fleet = self.rounds, self.fleet
        if rounds.per_round + rounds.spares > fleet.clients:
            spares = f" with spares = {rounds.spares}" if rounds.spares else ""
            raise ValueError(
                f"[rounds] per-round = {rounds.per_round}{spares} is more than "
                f"[fleet] clients = {fleet.clients}"
            )
        self._check_asynchronous()
        if rounds.spares and not fleet.timed:
            raise ValueError(
                "[rounds] spares need the simulated clock: give [fleet] speeds, devices or availability"
            )
        if rounds.needed > rounds.per_round:
            raise ValueError(
                f"[rounds] quorum = {rounds.quorum} is more than per-round = {rounds.per_round}"
            )
        self._check_privacy()
        ranks = {*fleet.rank_choices} or {self.lora.rank}
        try:
            check_ranks(self.strategy, fleet.rank_choices)
        except ConfigError as error:
            raise ValueError(f"[fleet] ranks: {error.what}; {error.fix}") from error
        if len(ranks) > 1 and self.lora.rslora:
            raise ValueError("[fleet] ranks are mixed: [lora] rslora has no common alpha then")
        self._check_pruning()
        if self.model.trust_remote_code and self.model.revision is None:
            raise ValueError("[model] trust-remote-code needs a pinned revision")
        self._check_method()
        self._check_compressor()
        return self

    def _check_method(self) -> None:
        """What an adapter that is not plain LoRA from the seed can be combined with."""
        lora, ranks = self.lora, self.fleet.rank_choices
        try:
            check_method(self.strategy, lora.form)
            check_init(self.strategy, lora.init)
        except ConfigError as error:
            raise ValueError(f"[lora] {error.what}; {error.fix}") from error
        try:
            private = self.training.dp is not None
            check_beside(self.strategy, first_plan(self.strategy).terms, dp_sgd=private)
        except ConfigError as error:
            raise ValueError(f"[strategy] {error.what}; {error.fix}") from error
        if self.frozen and lora.form != "lora":
            raise ValueError(
                f"[lora] head = 'frozen' belongs to method = 'lora', not to {lora.form!r}"
            )
        if ranks and (lora.form, lora.init) != ("lora", "default"):
            what = f"init = {lora.init!r}" if lora.form == "lora" else f"method = {lora.form!r}"
            raise ValueError(f"[fleet] ranks: {what} takes its one rank from [lora] rank")
        if self.one_by_one and self.engine.cohort not in (1, "auto"):
            what = "load-in" if lora.form == "lora" else f"method = {lora.form!r}"
            raise ValueError(
                f"[engine] cohort = {self.engine.cohort}: clients with {what} are "
                'trained one by one; set cohort = 1 or "auto"'
            )
        held = f"load-in = {self.model.load_in!r}" if self.model.load_in else self.engine.precision
        if family_of(lora).from_weights(lora) and held not in ("fp32", "tf32"):
            raise ValueError(
                f"[lora] method = {lora.method!r} works out frozen tensors from the base weights, and clients "
                f"that hold them in {held} get others; set [engine] precision = 'fp32'"
            )
        if self.model.load_in is not None and lora.init != "default":
            raise ValueError(
                f"[lora] init = {lora.init!r} changes the base weights, and [model] load-in holds "
                "them in few bits"
            )

    @property
    def one_by_one(self) -> bool:
        """Whether only the plain PEFT loop can train these sites, not the cohort engine."""
        return self.lora.form != "lora" or self.model.load_in is not None

    def _check_privacy(self) -> None:
        """What the account of a private run relies on."""
        rule, rounds, fleet = self.strategy, self.rounds, self.fleet
        if self.training.dp is not None and self.engine.cohort not in (1, "auto"):
            raise ValueError(
                f"[engine] cohort = {self.engine.cohort}: DP-SGD trains clients one by one; set "
                'cohort = 1 or "auto"'
            )
        if self.engine.gradient_checkpointing and self.training.dp is not None:
            raise ValueError(
                "[engine] gradient-checkpointing: [training] dp takes each example's gradient by hooks "
                "that a layer must not run into twice; leave one of the two out"
            )
        if rule.buffer_size is not None and self.training.dp is not None:
            raise ValueError(
                f"[training] dp: {rule.name} is asynchronous, and its jobs are not entered in the account; "
                "choose a rule of rounds"
            )
        if self.training.dp is not None and not task_of(self.model.task).alone:
            raise ValueError(
                f"[training] dp clips the gradient of each example, and in {self.model.task} the loss of "
                "one depends on others"
            )
        if self.lora.form != "lora" and self.training.dp is not None:
            raise ValueError(f"[training] dp needs [lora] method = 'lora', not {self.lora.form!r}")
        if self.data.holdout and self.training.dp is not None:
            raise ValueError(
                f"[data] holdout = {self.data.holdout}: clients would report scores on examples of "
                "theirs, which [training] dp does not cover; leave it out"
            )
        below: Strategy = rule
        while isinstance(below, Combinator):
            below = below.inner
            if isinstance(below, CentralDP):
                raise ValueError(
                    f"[strategy] central-dp must be the outermost rule, not the inner one of {rule.name}: "
                    "what is changed before its noise is not accounted for"
                )
        if not isinstance(rule, CentralDP):
            return
        if rule.expected_sites not in (None, rounds.per_round):
            raise ValueError(
                f"[strategy] expected-sites = {rule.expected_sites}: central-dp samples [rounds] per-round "
                f"= {rounds.per_round} clients on average; leave the key out"
            )
        if rule.delta >= 1 / fleet.clients:
            raise ValueError(
                f"[strategy] delta = {rule.delta:g} promises nothing: it must be below 1 / clients = "
                f"{1 / fleet.clients:g}"
            )
        if fleet.timed:
            raise ValueError(
                "[fleet] speeds, bandwidths, devices and availability: central-dp samples every client "
                "independently of what it can do; leave them out"
            )

    def _check_compressor(self) -> None:
        """Refuse an encoding that changes what a rule or an account of privacy relies on."""
        compressor = self.engine.compressor
        if compressor.cast:
            return
        name = f"[engine] compressor = {compressor.label!r}"
        if self.training.dp is not None:
            raise ValueError(
                f"{name}: under [training] dp a change is mostly noise, which fills every block that is "
                'compressed, and rounding adds to it what protects nobody; choose "bf16" or "fp32"'
            )
        below: Strategy = self.strategy
        while True:
            if isinstance(below, CentralDP):
                raise ValueError(
                    f"{name}: central-dp bounds the norm of each change, and what rounding adds would "
                    'take from that bound and protect nobody; choose "bf16" or "fp32"'
                )
            if below.chooses:
                raise ValueError(
                    f"{name}: {below.name} chooses among the replies, and what is right in their mean "
                    "alone is the noise of one reply in what it chooses; choose "
                    '"bf16" or "fp32", or a rule that takes the mean'
                )
            if not isinstance(below, Combinator):
                return
            below = below.inner

    def _check_pruning(self) -> None:
        """What leaving blocks out can be combined with."""
        selection = self.pruning.selection
        if selection == "none":
            return
        if why := unprunable(self.lora):
            raise ValueError(f"[pruning] selection = {selection!r}: {why}")
        if isinstance(self.strategy, CentralDP):
            raise ValueError(
                f"[pruning] selection = {selection!r}: central-dp puts noise on every layer, and "
                "divides by clients that hold none of it"
            )
        if self.training.dp is not None and selection in ("cka", "importance"):
            raise ValueError(
                f"[pruning] selection = {selection!r}: what clients say of the blocks is not in the "
                "account of [training] dp; choose random, stride, first or last"
            )

    def _check_asynchronous(self) -> None:
        """Refuse what an asynchronous rule has no use for, or cannot do without."""
        rounds, buffer, name = self.rounds, self.strategy.buffer_size, self.strategy.name
        if buffer is None:
            return
        if not self.fleet.timed:
            raise ValueError(
                f"[strategy] {name} is asynchronous and needs the simulated clock: "
                "give [fleet] speeds or devices"
            )
        if buffer > self.fleet.clients:
            raise ValueError(
                f"[strategy] {name} waits for {buffer} replies of different clients, and "
                f"[fleet] clients = {self.fleet.clients}"
            )
        if self.pruning.selection != "none":
            raise ValueError(
                f"[pruning] selection = {self.pruning.selection!r} compares layers round by round, and "
                f"[strategy] {name} has no rounds"
            )
        if rounds.spares or rounds.quorum is not None:
            raise ValueError(
                f"[rounds] spares and quorum are of rounds, and [strategy] {name} has none"
            )

    def rule(self, classes: int = 0) -> Strategy:
        """The aggregation rule with the facts of this run; ``classes``: of its data."""
        clients, per_round = self.fleet.clients, self.rounds.per_round
        return self.strategy.of_run(RunFacts(self.seed, clients, per_round, classes))

    @property
    def rank(self) -> int:
        """The rank of the global adapter: the largest in the fleet."""
        return max(self.fleet.rank_choices, default=self.lora.rank)

    @property
    def frozen(self) -> frozenset[Part]:
        """The parts of the adapter that nobody trains."""
        parts: set[Part] = {"head"} if self.lora.head == "frozen" else set()
        return frozenset(parts)

    @property
    def devices(self) -> Fleet:
        """What each site's device can do."""
        fleet = self.fleet
        return Fleet(
            seed=self.seed,
            ranks=fleet.ranks,
            memory_mib=fleet.memory_budgets_mib,
            samples_per_s=fleet.speeds,
            up_mbps=fleet.up_mbps,
            down_mbps=fleet.down_mbps,
            devices=fleet.devices,
        )

    @property
    def availability(self) -> Availability | None:
        """When sites can be reached, read from its file; None where they always can."""
        fleet = self.fleet
        if fleet.availability is None:
            return None
        return read_availability(Path(fleet.availability), fleet.period_s, self.seed)

    def task(self, **facts: Any) -> TaskSpec:
        """What the sites need to know; ``facts`` are further fields of :class:`TaskSpec`."""
        own: dict[str, Any] = {
            "model": self.model,
            "lora": self.lora,
            "data": self.data,
            "seed": self.seed,
            "clients": self.fleet.clients,
            "wire": spelled(self.engine.compressor),
            "gradient_checkpointing": self.engine.gradient_checkpointing,
            "attack": self.fleet.attack,
        }
        return TaskSpec(**{**own, **facts})

    def to_toml(self) -> str:
        """The resolved configuration; reading it gives this object again."""
        return tomli_w.dumps(self.model_dump(mode="json", by_alias=True, exclude_none=True))


def check_real(config: RunConfig) -> None:
    """Refuse what only a simulation does.

    Raises:
        ConfigError: the configuration asks sites to lie, or has a simulated clock.
    """
    if config.fleet.timed:
        raise ConfigError(
            "[fleet] speeds, bandwidths, devices and availability are for simulations; real clients "
            "take the time they take",
            fix="Remove the keys, or run it with: fedft simulate CONFIG",
        )
    if isinstance(config.strategy, CentralDP):
        raise ConfigError(
            "[strategy] central-dp samples a fixed roster of clients independently, and real clients come "
            "and go: the account would not hold",
            fix="Protect examples instead, with [training] dp, or run it with: fedft simulate CONFIG",
        )
    if config.fleet.attack is not None:
        raise ConfigError(
            "[fleet] attack makes clients lie, which is for simulations; real clients are never asked to",
            fix="Remove the key, or run it with: fedft simulate CONFIG",
        )
