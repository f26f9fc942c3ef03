"""What a client takes part in: decided by whoever owns the data, checked before any work.

A policy is a table, in a file (``fedft join --policy FILE``, TOML) or as options of ``fedft join``.
The server learns of a refusal by one word of :mod:`fedft.core.link.codes`; the sentence is for the
client's own screen. The defaults let an honest run through and bound what a plan can cost.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from fedft.clients.ledger import DELTA, Ledger, Release
from fedft.core.complaints import complaints
from fedft.core.data.batches import steps_of
from fedft.core.errors import ConfigError, FedftError, MismatchError, SecurityRefusal
from fedft.core.link.codes import coded
from fedft.core.parts import Part, checked
from fedft.core.plugins import USER
from fedft.core.schedules import Over
from fedft.core.spec import ModelSpec, Table, TaskName, TaskSpec
from fedft.core.sublayers import Half
from fedft.core.tasks import TASKS, task_of
from fedft.core.terms import terms_from
from fedft.core.toml import read_toml
from fedft.core.trainers import TrainerName
from fedft.core.types import Importance, LocalTraining

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

LONGEST_PLAN = 1_000_000
"""Characters of a plan."""


class Policy(Table):
    """The conditions of one client. Keys are in kebab-case in the file.

    Attributes:
        least_noise: noise multiplier of DP-SGD that every training has at least; what says anything
            about the rows without noise is refused then. None asks for none.
        most_epsilon: ε that all results on these data come to at most, those of earlier runs too; a
            result that no noise protects has no ε, and is refused. None sets no limit.
        delta: at which this ε is accounted.
        most_rounds: trainings of one run, repeated ones counted.
        most_epochs: of a training.
        most_steps: of a training, whether it is asked for in steps or in epochs.
        most_seconds: for one training, evaluation or comparison; it is given up then.
        most_batch_size: examples a step.
        most_rank: of an adapter.
        most_parameters: of an adapter, its head included, and of what local training has beside it.
        most_length: tokens of a row.
        models: SHA-256 of each weights file that may be loaded; None takes any that the sources give.
        sources: models that the server may name, as they stand in its ``[model] source``. The one
            that ``--model`` names is used whatever the server names.
        tasks: what may be trained.
        classes: names of classes that the server may agree on; None takes its own.
        least_clients: without whose replies no round counts, as far as the server says so; it can
            lie about that.
        metrics: whether losses, scores and comparisons of blocks leave.
        trainers: ``module:function`` names of trainers of one's own that a run may have: code on this
            machine, which is imported when the policy is read. A server sends a name and no code.
    """

    least_noise: PositiveFloat | None = None
    most_epsilon: PositiveFloat | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = DELTA
    most_rounds: PositiveInt = 10_000
    most_epochs: PositiveInt = 100
    most_steps: PositiveInt = 100_000
    most_seconds: PositiveFloat = 21_600.0
    most_batch_size: PositiveInt = 1024
    most_rank: PositiveInt = 1024
    most_parameters: PositiveInt = 1_000_000_000
    most_length: PositiveInt = 32_768
    models: tuple[Sha256, ...] | None = None
    sources: tuple[str, ...] = ("wheel:*",)
    tasks: tuple[TaskName, ...] = tuple(TASKS)
    classes: tuple[str, ...] | None = None
    least_clients: PositiveInt = 1
    metrics: bool = True
    trainers: tuple[TrainerName, ...] = ()

    @model_validator(mode="after")
    def _meant(self) -> Self:
        if any("*" in source and source != "wheel:*" for source in self.sources):
            raise ValueError("the one pattern among sources is wheel:*; others are named in full")
        return self

    @classmethod
    def read(cls, path: Path | None, options: Mapping[str, Any]) -> "Policy":
        """The policy of a file with options laid over it; None of an option says nothing.

        Raises:
            ConfigError: a key or a value is none.
        """
        table = {} if path is None else read_toml(path)
        given = {name.replace("_", "-"): v for name, v in options.items() if v is not None}
        try:
            return cls.model_validate({**table, **given}, context=USER)
        except ValidationError as error:
            fault = complaints(error)[0]
            key = ".".join(fault.path)
            where = f"--{key}" if key in given else f"{path}: {key}" if path else key
            rule = "unknown key" if fault.kind == "extra_forbidden" else fault.rule
            raise ConfigError(
                f"{where} = {fault.shown}: {rule}",
                fix="docs/deployment.md lists what a client's policy can say.",
            ) from error

    def lines(self) -> list[str]:
        """What it says, for its owner."""
        noise = self.least_noise
        return [
            f"noise multiplier {'any, or none' if noise is None else f'{noise:g} or more'}; ε "
            f"{'any' if self.most_epsilon is None else f'at most {self.most_epsilon:g}'} at δ = "
            f"{self.delta:g}",
            f"at most {self.most_rounds:,} rounds of {self.most_epochs:,} epochs, "
            f"{self.most_steps:,} steps, {self.most_batch_size:,} examples a step and "
            f"{self.most_seconds:,.0f} s",
            f"adapters to rank {self.most_rank:,} and {self.most_parameters:,} parameters; rows to "
            f"{self.most_length:,} tokens",
            f"models {', '.join(self.sources) or 'by --model only'}"
            + ("" if self.models is None else f" of {len(self.models)} known weights"),
            f"tasks {', '.join(self.tasks)}"
            + ("" if self.classes is None else f"; classes {', '.join(self.classes)}"),
            f"rounds of {self.least_clients} clients or more; losses and scores "
            f"{'leave' if self.metrics else 'stay'}",
            f"trainers {', '.join(self.trainers) or 'none but fedft’s own loop'}",
        ]

    # ── a task ────────────────────────────────────────────────────────────────────────────────

    def check_task(self, task: TaskSpec) -> None:
        """Refuse a task that this client has no part in. Looks at no file.

        Raises:
            SecurityRefusal: with the word ``task``, ``trainer``, ``limits`` or ``clients``.
        """
        if task.model.task not in self.tasks:
            raise _refused("task", f"the run's task is {task.model.task}", "tasks")
        if task.trainer is not None and task.trainer not in self.trainers:
            raise _refused("trainer", f"the run trains by {task.trainer[:200]}", "trainers")
        if task_of(task.model.task).classes and len(set(task.classes)) < 2:
            # Else the classes would be those found here, and their names would leave as a hash.
            raise _refused("task", "the server names no classes", "classes")
        if self.classes is not None and (foreign := set(task.classes) - set(self.classes)):
            raise _refused("task", f"the run has the class {min(foreign)[:80]!r}", "classes")
        for value, key, what in (
            (task.lora.rank, "most_rank", "the rank of its adapter"),
            (task.lora.heads or 1, "most_rank", "the number of its adapter's heads"),
            (task.data.max_length, "most_length", "its longest row"),
            (max(task.lora.layers or (0,)), "most_rank", "its highest block"),
        ):
            self._at_most(value, key, what)
        for name, value in _numbers_in(task.lora.options):
            if abs(value) > self.most_rank and "key" not in name:
                what = f"[lora] options ask for {name[:40]} = {_short(value)}"
                raise _refused("limits", what, "most_rank")
        if task.quorum < self.least_clients and self.least_clients > 1:
            raise _refused(
                "clients",
                f"a round counts with {task.quorum or 'any number of'} clients",
                "least_clients",
            )

    def check_source(self, model: ModelSpec, own: str | None) -> str:
        """The source to load the model from.

        Args:
            model: as the server names it.
            own: as this client's user does; it is used whatever the server names.

        Raises:
            SecurityRefusal: the server's is not allowed. Nothing was looked for.
        """
        if own is not None:
            return own
        source = model.source
        if source in self.sources or (source.startswith("wheel:") and "wheel:*" in self.sources):
            return source
        raise coded(
            SecurityRefusal(
                f"the run's model is {source[:200]!r}, and this client does not look for models that "
                "only a server has named",
                fix="If you know it, name it yourself: join with --model, a folder or an id of a hub.",
            ),
            "model",
        )

    def check_weights(self, files: Mapping[str, str]) -> None:
        """Refuse weights that are not among those allowed.

        Args:
            files: name of each file → its SHA-256.
        """
        for name, found in files.items():
            if self.models is not None and found not in self.models:
                raise _refused("model", f"{name} has the SHA-256 {found}", "models")

    def check_size(self, parameters: int, beside: int = 0) -> None:
        """Refuse an adapter that is too large, before it is made.

        Args:
            parameters: of the adapter.
            beside: numbers in the records that the plan's terms receive, send and keep.
        """
        what = "the number of its adapter's parameters"
        what += f", with {_short(beside)} beside it," if beside else ""
        self._at_most(parameters + beside, "most_parameters", what)

    # ── a piece of work ───────────────────────────────────────────────────────────────────────

    def check_training(self, training: LocalTraining, rank: int, rows: int, before: int) -> None:
        """Refuse a training that asks for too much.

        Args:
            training: as planned.
            rank: of the adapter.
            rows: that this client trains on.
            before: trainings of this run so far.
        """
        self._at_most(before + 1, "most_rounds", "the number of trainings in this run")
        self._at_most(rank, "most_rank", "the rank")
        self._at_most(training.step_rows, "most_batch_size", "the number of examples a step")
        if training.steps is None:
            self._at_most(training.epochs, "most_epochs", "the number of epochs")
        self._at_most(steps_of(rows, training), "most_steps", "the number of steps")
        if self.least_noise is not None and training.dp_noise < self.least_noise:
            asked = f"noise multiplier {training.dp_noise:g}" if training.dp_noise else "no noise"
            raise _refused("privacy", f"the plan has {asked}", "least_noise")

    def check_release(self, release: Release | None, ledger: Ledger, run: str) -> None:
        """Refuse what would say too much about the data, with all that was said before.

        A run that has trained with noise here never does with less, whatever the policy.
        """
        if release is None:
            return
        own = ledger.of_run(run)
        if own.steps and not own.unprotected:
            least = min(noise for noise, _ in own.steps)
            if release.mechanism == "none" or release.noise_multiplier < least:
                noise = release.noise_multiplier if release.mechanism != "none" else 0.0
                raise coded(
                    SecurityRefusal(
                        f"this run has trained here with noise multiplier {least:g}, and now asks "
                        f"for {noise:g}: its privacy was taken out",
                        fix="Ask whoever runs the server.",
                    ),
                    "privacy",
                )
        if self.least_noise is not None and release.mechanism == "none":
            raise _refused("privacy", "no noise would protect this result", "least_noise")
        if self.most_epsilon is None:
            return
        epsilon = ledger.would_spend(release, delta=self.delta)
        if not epsilon <= self.most_epsilon:
            raise _refused(
                "privacy",
                f"with this result ε on these data would be {epsilon:.4g} at δ = {self.delta:g}",
                "most_epsilon",
            )

    def check_scores(self, what: str) -> None:
        """Refuse to say how a model does on the client's rows, where that is to stay."""
        if not self.metrics:
            raise _refused("metrics", f"the plan asks for {what}", "metrics")

    def _at_most(self, value: int, key: str, what: str) -> None:
        limit = getattr(self, key)
        if value > limit:
            raise _refused("limits", f"{what} is {_short(value)}, above {limit:,}", key)


def _numbers_in(options: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The whole numbers among options and in their tables and lists."""
    for name, value in options.items():
        held: Iterable[Any] = (
            cast(Mapping[str, Any], value).values()
            if isinstance(value, Mapping)
            else cast(list[Any], value)
            if isinstance(value, list)
            else (value,)
        )
        yield from ((name, one) for one in held if isinstance(one, int))


def _short(value: int) -> str:
    return f"{value:,}" if abs(value) < 10**15 else "a number of many digits"


def _refused(word: str, what: str, key: str) -> FedftError:
    name = key.replace("_", "-")
    return coded(
        SecurityRefusal(
            f"{what}; the policy of this client ({name}) does not allow it",
            fix=f"To take part all the same, say so with {name} in --policy FILE.",
        ),
        word,
    )


# ── plans ─────────────────────────────────────────────────────────────────────────────────────


_MAX = 2**53
Count = Annotated[int, Field(ge=1, le=_MAX)]
Index = Annotated[int, Field(ge=0, le=_MAX)]
Real = Annotated[float, Field(ge=0, le=1e30)]
KnownPart = Annotated[Part, AfterValidator(checked)]
Layers = list[Index | tuple[Index, Half]] | None


class _Strict(BaseModel):
    # No Table: what it does before validation would make JSON's lists no tuples any more.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


Word = Annotated[str, Field(max_length=40)]
Option = bool | int | Annotated[float, Field(ge=-1e30, le=1e30)] | Word | list[float] | None


class _Schedule(_Strict):
    name: Word
    warmup_steps: Index
    warmup_ratio: Annotated[float, Field(ge=0, le=1)]
    over: Over
    options: Annotated[dict[Word, Option], Field(max_length=32)]
    rounds: Count


class Training(_Strict):
    """:class:`~fedft.core.training.LocalTraining` as it may come from a server."""

    epochs: Count
    steps: Count | None
    batch_size: Count
    lr: Real
    optimizer: Annotated[str, Field(max_length=40)]
    momentum: Real
    weight_decay: Real
    clip_norm: Real | None
    proximal_mu: Real
    tail_penalty: Real
    tail_keep: Annotated[float, Field(ge=0, le=1)]
    dp_noise: Real
    dp_clip: Real
    accumulate: Count = 1
    options: Annotated[dict[Word, Option], Field(max_length=32)] = {}
    schedule: _Schedule | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Literal["balanced"] | dict[str, Real] | None = None
    neftune_alpha: Real = 0.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.local().check()
        return self

    def local(self) -> LocalTraining:
        """The same values as plain data."""
        return LocalTraining.of_fields(self.model_dump())


class _Plan(_Strict):
    scale: Annotated[float, Field(ge=-1e30, le=1e30)]
    rank: Count
    keep: list[KnownPart]
    layers: Layers
    round: Index
    site: Annotated[str, Field(max_length=200)]


class TrainFields(_Plan):
    """What a plan to train says."""

    train: list[KnownPart]
    send: list[KnownPart]
    basis: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None
    training: Training
    heads: list[Index] | None
    terms: list[dict[str, Any]] = []


class EvalFields(_Plan):
    """What a plan to evaluate or compare says."""

    split: Literal["test", "holdout"]
    shard: tuple[Index, Count]
    probe: Importance | None
    granularity: Literal["block", "sublayer"]


def plan_of(kind: str, plan: str) -> TrainFields | EvalFields:
    """A plan as it came from a server, every field of the kind and the size that it may have.

    Raises:
        MismatchError: it is none; with the word ``plan``.
    """
    kinds: Mapping[str, type[TrainFields | EvalFields]] = {
        "train": TrainFields,
        "evaluate": EvalFields,
    }
    if kind not in kinds:
        raise coded(MismatchError(f"{kind[:40]!r} is no kind of work that a client does"), "plan")
    if len(plan) > LONGEST_PLAN:
        raise coded(MismatchError(f"a plan of {len(plan):,} characters"), "plan")
    try:
        fields = kinds[kind].model_validate_json(plan)
        if isinstance(fields, TrainFields):
            terms_from(fields.terms)
        return fields
    except MismatchError as error:
        raise coded(error, "plan") from None
    except ValidationError as error:
        fault = complaints(error)[0]
        where = ".".join(fault.path)[:80] or "the plan"
        raise coded(
            MismatchError(
                f"the server's plan cannot be used: {where} = {fault.shown}: {fault.rule}",
                fix="Install the same version of fedft on both sides.",
            ),
            "plan",
        ) from error
