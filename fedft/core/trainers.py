"""A trainer of one's own as a client: what `[training] trainer` may name, and what it is given.

A trainer is a function of three arguments that gives anything with a ``train()``:

    def make_trainer(model, rows, settings):
        return SFTTrainer(model, SFTConfig(settings.output_folder, seed=settings.seed), …)

It is named as ``package.module:function`` in the configuration, or handed over from Python. Only the
name travels: a real client imports it where its own policy names it, and nowhere else.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, ValidationInfo

from fedft.core.errors import ConfigError
from fedft.core.plugins import Registry, Unfit, trusted
from fedft.core.types import LocalTraining, TrainPlan


@dataclass(frozen=True)
class TrainerSettings:
    """What a trainer of one's own is told beside its model and its rows.

    Every field has a default, so that a script can make one for training on one machine alone.

    Attributes:
        client: name of the client.
        round: of the run, from 1.
        seed: of this client in this round, below 2³². The generators of Python, NumPy and torch are
            seeded by it before the function is called; transformers' trainers seed them again by
            their own argument ``seed``, which is to be this one.
        training: the `[training]` table, for what the function wants to take from it.
        max_length: `[data] max-length`, in tokens.
        output_folder: a folder of this training alone, which is removed after it.
        tokenizer: of the model, a copy of one's own; of images the function from an RGB image to
            pixel values [c, h, w].
        device: of torch, where the model lies.
        classes: names of the run's classes, which the rows have them by; a class id is an index of this.
            Empty where the task has none.
    """

    client: str = ""
    round: int = 1
    seed: int = 0
    training: LocalTraining = field(default_factory=LocalTraining)
    max_length: int = 128
    output_folder: str = "output"
    tokenizer: Any = None
    device: str = "cpu"
    classes: tuple[str, ...] = ()


Making = Callable[[Any, list[dict[str, Any]], TrainerSettings], Any]
"""(model, rows, settings) → anything with ``train()``."""

_CALLED = "make_trainer(model, rows, settings)"


def _accept(found: object) -> Making:
    if not callable(found):
        raise Unfit(f"it is a {type(found).__name__}, and is called as {_CALLED}")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # of code in C; whoever calls it will see
        return cast(Making, found)
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise Unfit(f"it takes {signature}, and is called as {_CALLED}: {error}") from None
    return cast(Making, found)


REGISTRY: Registry[Making] = Registry("trainers", "trainer", {}, _accept)
"""What `[training] trainer` may name. fedft has none of its own; packages register theirs as entry points of
the group ``fedft.trainers``."""


def _known(given: object, info: ValidationInfo) -> object:
    """The name that finds a trainer again; a function from Python is admitted."""
    try:
        if isinstance(given, str):
            return REGISTRY.find(given, trusted(info.context)).name
        if isinstance(given, type | FunctionType):
            return REGISTRY.admit(given).name
    except ConfigError as error:
        raise ValueError(f"{error.what}; {error.fix}") from error
    if callable(given):  # an instance, a partial: nothing that could be found again by its name
        raise ValueError(
            f"a {type(given).__name__} has no name of its own; define a function that calls it"
        )
    return given


TrainerName = Annotated[str, BeforeValidator(_known)]
"""Name of a trainer that whoever names it is trusted to have imported."""


def trainer_of(name: str) -> Making:
    """The function behind a name that a validated table has.

    Raises:
        ConfigError, SecurityRefusal: as :meth:`~fedft.core.plugins.Registry.find`.
    """
    return REGISTRY.find(name).value


def beyond(plan: TrainPlan) -> str | None:
    """What a plan asks for that only fedft's own loop does, in words; None where it asks for nothing."""
    if plan.layers is not None:
        return "a part of the blocks"
    if plan.heads is not None:
        return "some heads of several"
    return beyond_training(plan.training, [term.model_dump() for term in plan.terms])


def beyond_training(training: LocalTraining, terms: Sequence[Mapping[str, Any]]) -> str | None:
    """The same of its training and of its terms, as JSON data."""
    asked = {
        "the noise of DP-SGD": training.dp_noise,
        "a proximal term": training.proximal_mu,
        "a penalty on the tail of the rank": training.tail_penalty,
        **{f"the term {str(term.get('kind'))[:80]!r}": True for term in terms},
    }
    return next((what for what, there in asked.items() if there), None)
