"""The configuration of a run: one TOML file, validated whole before anything starts."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import (
    Field,
    model_validator,
)

from fedft.core.adapters import family_of
from fedft.core.errors import ConfigError
from fedft.core.spec import (
    DataSpec,
    LoraSpec,
    ModelSpec,
    Table,
    TaskSpec,
)
from fedft.core.tasks import Task, task_of
from fedft.core.trainers import beyond
from fedft.core.training_table import TrainingSpec
from fedft.core.types import Part
from fedft.core.wire.compress import spelled
from fedft.server.availability import Availability, read_availability
from fedft.server.fleet import (
    Fleet,
)
from fedft.server.measuring import EvaluationSpec
from fedft.server.pruning import PruningSpec, unprunable
from fedft.server.tables import EngineSpec, FleetSpec, RoundsSpec, TrackSpec
from fedft.strategies import (
    AnyStrategy,
    CentralDP,
    FedAvgLoRA,
    RunFacts,
    Strategy,
    check_init,
    check_method,
    check_ranks,
    check_start,
)
from fedft.strategies.beside import check_beside, first_plan
from fedft.strategies.combinator import Combinator


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
        self._check_packing()
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
        if (why := task_of(self.model.task).against(self.training.local())) is not None:
            raise ValueError(f"[training] {why}")
        self._check_method()
        self._check_trainer()
        self._check_compressor()
        try:
            self.judged  # noqa: B018
        except ConfigError as error:
            raise ValueError(f"[evaluation] {error.what}; {error.fix}") from error
        return self

    def _check_method(self) -> None:
        """What an adapter that is not plain LoRA from the seed can be combined with."""
        lora, ranks = self.lora, self.fleet.rank_choices
        try:
            check_method(self.strategy, lora.form)
            check_init(self.strategy, lora.init)
            if lora.start is not None:
                check_start(self.strategy)
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
            plain = lora.form == "lora"
            what = (
                f"method = {lora.form!r}"
                if not plain
                else "load-in"
                if self.model.load_in
                else "a trainer"
            )
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

    def _check_trainer(self) -> None:
        """Refuse what a trainer of one's own would leave undone, by the name of whoever asks for it."""
        training, name = self.training, self.training.trainer
        if name is None:
            return
        asked = {
            "[training] dp asks for noise": training.dp,
            "[training] method asks for a term": training.method,
            "[lora] method = 'hydralora' asks for a router and several heads": self.lora.heads,
            f"[pruning] selection = {self.pruning.selection!r} asks for a part of the blocks": (
                self.pruning.selection != "none"
            ),
            "[engine] gradient-checkpointing is of fedft's own loop, and asks": (
                self.engine.gradient_checkpointing
            ),
            "[model] load-in asks for a base in few bits, whose copy cannot be checked": (
                self.model.load_in
            ),
        }
        what = next((what for what, there in asked.items() if there), None)
        if what is None:
            plan = first_plan(self.strategy, self.rank)
            plan = replace(plan, training=training.local().overlaid(plan.training))
            term = beyond(plan)
            what = None if term is None else f"[strategy] {self.strategy.name} asks for {term}"
        if what is not None:
            raise ValueError(
                f"[training] trainer = {name!r}: {what}, and a trainer of one's own would not do it; "
                "leave one of the two out"
            )
        module = name.partition(":")[0]
        if self.engine.backend != "inline" and (module == "__main__" or "<" in name):
            raise ValueError(
                f"[training] trainer = {name!r} is of a script, or within a function, where the workers "
                f"of backend = {self.engine.backend!r} cannot find it; move it into a module, or set "
                'backend = "inline"'
            )

    @property
    def one_by_one(self) -> bool:
        """Whether only the plain PEFT loop can train these sites, not the cohort engine."""
        return (
            self.lora.form != "lora"
            or self.model.load_in is not None
            or self.training.trainer is not None
        )

    def _check_packing(self) -> None:
        """What can be put into one sequence."""
        if not self.data.packing:
            return
        if not task_of(self.model.task).packs:
            raise ValueError(
                f"[data] packing puts several rows into one sequence, and {self.model.task} reads each "
                "row for itself; leave it out"
            )
        if self.training.dp is not None:
            raise ValueError(
                "[data] packing: [training] dp takes each example's gradient, and of packed rows only "
                "that of their sequence can be told; leave one of the two out"
            )
        if self.training.accumulate > 1:
            raise ValueError(
                "[data] packing makes steps of sequences, and [training] accumulate cuts them by rows; "
                "leave one of the two out"
            )
        if self.training.trainer is not None:
            raise ValueError(
                f"[data] packing: a trainer of one's own, {self.training.trainer!r}, makes its own batches; "
                "leave the key out, and have the trainer pack"
            )

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
        if task_of(self.model.task).refers:
            raise ValueError(
                f"[pruning] selection = {selection!r}: {self.model.task} compares with the whole base, of "
                "which these clients hold a part"
            )
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
    def judged(self) -> Task:
        """What is fine-tuned, judged by what the run is judged by."""
        return self.evaluation.judged(self.model.task).with_objective(self.model.objective)

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
            "lora": self.lora.model_copy(update={"start": None}),  # a folder of the server's
            "data": self.data,
            "seed": self.seed,
            "clients": self.fleet.clients,
            "wire": spelled(self.engine.compressor),
            "gradient_checkpointing": self.engine.gradient_checkpointing,
            "attack": self.fleet.attack,
            "new_tokens": self.evaluation.max_new_tokens,
            "trainer": self.training.trainer,
            "metrics": self.evaluation.judges(self.model.task),
            "per_class": self.evaluation.per_class,
            "test_rows": self.evaluation.max_rows,
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
