"""`[lora] start`: the adapter that a run goes on from, checked against the run and kept beside it."""

import hashlib
from pathlib import Path

import torch

from fedft.core import models
from fedft.core.adapters.files import CONFIG, WEIGHTS, load_adapter, read_json
from fedft.core.errors import MismatchError
from fedft.core.files import Files, disk, open_plain, write_file
from fedft.core.models import Schema
from fedft.core.record.rundir import RunDir
from fedft.core.tasks import task_of
from fedft.core.types import PREFIX, Adapter, Factors
from fedft.server.config import RunConfig


def kept(config: RunConfig, run: RunDir) -> Path | None:
    """The run's own copy of the adapter; made before the first round, so that the folder may go then.

    Returns:
        Its folder; None where the seed makes the first adapter.

    Raises:
        MismatchError: there is no such adapter, and no copy either.
        SecurityRefusal: it is a pickle.
    """
    if config.lora.start is None:
        return None
    source = Path(config.lora.start)
    if run.begun or (not source.exists() and (run.start / CONFIG).exists()):
        return run.start
    load_adapter(source)  # what cannot be read is not copied
    with disk(f"create {run.start}"):
        Files().mkdir(run.start)
        Files().sync_folder(run.path)
    for name in (WEIGHTS, CONFIG):  # where the last one is, both are
        with open_plain(source / name, within=source) as file:
            write_file(run.start / name, file.read())
    return run.start


def digest(folder: Path) -> str:
    """SHA-256 over both files of an adapter.

    Raises:
        MismatchError: one is not there.
    """
    found = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        try:
            with open_plain(folder / name, within=folder) as file:
                found.update(hashlib.sha256(file.read()).digest())
        except FileNotFoundError as error:
            raise MismatchError(
                f"{folder} has no {name}, and the run started from it",
                fix="Restore the folder from a copy of the run directory.",
            ) from error
    return found.hexdigest()


def read(config: RunConfig, shapes: Schema, folder: Path) -> Adapter:
    """The adapter in a folder, as the first one of a run: in float32, tensors in the run's order.

    Args:
        config: of the run.
        shapes: of its model.
        folder: as peft wrote it.

    Raises:
        MismatchError: it is no LoRA adapter, or is of other layers, of another rank or scale, of another
            model or head, or not finite.
        SecurityRefusal: it is a pickle.
    """
    found = load_adapter(folder)
    wanted = models.initial_adapter(shapes, config.lora, config.rank, config.seed)
    _check_layers(config, found, wanted)
    beside = {PREFIX + name for name in shapes.saved.beside}
    _check_head(found, wanted, beside)
    if wanted.head:
        _check_kind(config, read_json(folder / CONFIG).get("task_type"))
    tensors = found.tensors()
    taken = {name: tensors[name].float() for name in wanted.tensors()}
    if wild := [name for name, tensor in taken.items() if not bool(torch.isfinite(tensor).all())]:
        raise _unfit(f"{wild[0]} holds NaN or Inf", "Choose another adapter.")
    return wanted.replaced(taken)


def _unfit(why: str, fix: str) -> MismatchError:
    return MismatchError(f"the run cannot go on from the adapter of [lora] start: {why}", fix=fix)


def _check_layers(config: RunConfig, found: Adapter, wanted: Adapter) -> None:
    if found.factors.keys() != wanted.factors.keys():
        lacking = sorted(wanted.factors.keys() - found.factors.keys())
        more = sorted(found.factors.keys() - wanted.factors.keys())
        what = (
            f"it has no {lacking[0]}" if lacking else f"it adapts {more[0]}, which the run does not"
        )
        raise _unfit(
            f"{what} ({len(found.factors)} layers there, {len(wanted.factors)} here)",
            "Name its layers in [lora] target-modules and layers.",
        )
    for module, mine in wanted.factors.items():
        theirs = found.factors[module]
        if theirs.rank != mine.rank:
            raise _unfit(
                f"its rank is {theirs.rank}, and the largest of the run is {mine.rank}",
                f"Set [lora] rank = {theirs.rank}, and alpha to go with it.",
            )
        if _sides(theirs) != _sides(mine):
            raise _unfit(
                f"{module} is {_sides(theirs)} there and {_sides(mine)} here",
                "Name the model that it was trained on in [model] source.",
            )
        if abs(theirs.scale - mine.scale) > 1e-9 * mine.scale:
            root = config.lora.rslora
            alpha = theirs.scale * (mine.rank**0.5 if root else mine.rank)
            raise _unfit(
                f"its scale is {theirs.scale:g}, and that of the run is {mine.scale:g}",
                f"Set [lora] alpha = {alpha:g}.",
            )


def _sides(factors: Factors) -> str:
    return f"{factors.B.shape[0]} x {factors.A.shape[1]}"


def _check_head(found: Adapter, wanted: Adapter, beside: set[str]) -> None:
    own = found.head.keys() - beside
    if lacking := sorted(wanted.head.keys() - own):
        raise _unfit(
            f"it has no {lacking[0]}, which is of the head",
            "Save it with the head (peft's modules_to_save), or train a new adapter.",
        )
    if more := sorted(own - wanted.head.keys()):
        raise _unfit(
            f"it brings {more[0]}, which the run's model has not", "Choose another adapter."
        )
    for name, mine in wanted.head.items():
        if found.head[name].shape != mine.shape:
            raise _unfit(
                f"{name} is {tuple(found.head[name].shape)} there and {tuple(mine.shape)} here",
                "Give the run the classes that it was trained on.",
            )


def _check_kind(config: RunConfig, told: object) -> None:
    """A head of the same shape may be of another task: peft writes what kind of model it was on."""
    mine = task_of(config.model.task).peft
    if told and mine and told != mine:
        raise _unfit(
            f"its head is of peft's task type {str(told)[:40]}, and {config.model.task} is {mine}",
            "Set [model] task to what it was trained for, or choose another adapter.",
        )
