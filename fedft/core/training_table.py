"""The table `[training]` of the configuration, and what is below it."""

from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationInfo,
    model_validator,
)

from fedft.core.errors import ConfigError
from fedft.core.plugins import trusted
from fedft.core.strict import Fraction, Table
from fedft.core.terms import REGISTRY as METHODS
from fedft.core.terms import Proximal, Tail, Term, choice
from fedft.core.trainers import TrainerName
from fedft.core.training import LocalTraining
from fedft.core.training_keys import OptimizerKey, ScheduleKey, optimizer_of, schedule_of


class DPSpec(Table):
    """`[training] dp`: example-level DP-SGD at every site. Needs fedft[privacy].

    Sites train one at a time in the plain loop. Batches are Poisson samples and noise is the
    operating system's, so that such a run cannot be repeated.

    Attributes:
        noise_multiplier: standard deviation of the noise in units of ``max_grad_norm``; at least
            0.01, below which no account ends, and none would promise anything.
        max_grad_norm: what each example's gradient is clipped to; ``clip-norm`` is not used.
        delta: of the guarantee; well below 1 / examples of a site.
    """

    noise_multiplier: Annotated[float, Field(ge=0.01)] = 1.0
    max_grad_norm: PositiveFloat = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5


def _admitted(method: type) -> str:
    """The name that finds a client method's class again, which Python handed over."""
    try:
        return METHODS.admit(method).name
    except ConfigError as error:
        raise ValueError(f"{error.what}; {error.fix}") from error


class TrainingSpec(Table):
    """`[training]`: local optimisation. See :class:`~fedft.core.training.LocalTraining`.

    TOML has no null: ``clip-norm = 0`` is what ``None`` is there, no clipping. ``dp`` turns DP-SGD
    on, see :class:`DPSpec`. ``method`` names a client method beside the rule's own, whose values are
    a table of its name: ``method = "proximal"`` with ``proximal = { mu = 0.1 }``. One of another
    package is written with its values: ``method = { kind = "package.module:Class", mu = 0.1 }``.
    ``optimizer`` and ``schedule`` are a name, or a table of a name and its options, such as
    ``optimizer = { name = "RMSprop", alpha = 0.9 }``: see docs/training.md.

    Attributes:
        trainer: ``package.module:function`` of one's own that trains in place of fedft's loop, and reads
            of this table what it wants to; see :mod:`fedft.core.trainers`.
    """

    epochs: PositiveInt = 1
    steps: PositiveInt | None = None
    batch_size: PositiveInt = 8
    lr: PositiveFloat = 5e-3
    optimizer: OptimizerKey = "adamw"
    momentum: Fraction = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    method: SerializeAsAny[Term] | None = None
    dp: DPSpec | None = None
    accumulate: Annotated[int, Field(gt=0, le=100_000)] = 1
    schedule: ScheduleKey = None
    label_smoothing: Fraction = 0.0
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(ge=0)]] | None = None
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    trainer: TrainerName | None = None

    @model_validator(mode="before")
    @classmethod
    def _chosen(cls, table: Any, info: ValidationInfo) -> Any:
        """``method`` as a term, from its name and the table of that name, or as it was written out."""
        if not isinstance(table, dict):
            return cast(object, table)
        rest = dict(cast(dict[str, Any], table))
        given = rest.get("method")
        if isinstance(given, type):
            given = _admitted(given)
        if not isinstance(given, str | dict):
            return rest
        options = dict(cast(dict[str, Any], given)) if isinstance(given, dict) else {}
        name = str(options.pop("kind", "")) if isinstance(given, dict) else given
        own = rest.pop(name, {}) if isinstance(given, str) else options
        if not isinstance(own, dict):
            raise ValueError(f"{name}: a table of the method's values is expected")
        return {**rest, "method": choice(name, cast(dict[str, Any], own), trusted(info.context))}

    @model_validator(mode="after")
    def _once(self) -> Self:
        if self.method is not None and not self.method.kind:
            raise ValueError(
                f"{type(self.method).__name__} is the term of a method from outside; name the method, "
                'as in method = { kind = "package.module:Class" }'
            )
        if isinstance(self.method, Proximal) and self.proximal_mu:
            raise ValueError(
                'proximal-mu and method = "proximal" say the same; leave one of them out'
            )
        return self

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.local().check()
        return self

    def terms(self) -> tuple[Term, ...]:
        """The chosen method where it has no fields of :class:`LocalTraining`."""
        with_fields = self.method is None or isinstance(self.method, Proximal | Tail)
        return () if with_fields else (cast(Term, self.method),)

    def local(self, rounds: int = 1) -> LocalTraining:
        """The same values as plain data.

        Args:
            rounds: of the run, over which a schedule goes.
        """
        optimizer, options = optimizer_of(self.optimizer)
        values: dict[str, Any] = {
            **self.model_dump(exclude={"dp", "method", "trainer"}),
            "clip_norm": self.clip_norm or None,
            "optimizer": optimizer,
            "options": options,
            "schedule": schedule_of(self.schedule, rounds),
        }
        if self.dp is not None:
            values["dp_noise"] = self.dp.noise_multiplier
            values["dp_clip"] = self.dp.max_grad_norm
        if isinstance(self.method, Proximal):
            values["proximal_mu"] = self.method.mu
        if isinstance(self.method, Tail):
            values["tail_penalty"], values["tail_keep"] = self.method.strength, self.method.keep
        return LocalTraining(**values)
