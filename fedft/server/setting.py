"""What a run works on: model, data, partition and workers, loaded once before the first round."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from flwr.app import RecordDict

from fedft.core import models
from fedft.core.adapters import family_of
from fedft.core.data import partition
from fedft.core.data.partition import Manifest
from fedft.core.data.source import Data
from fedft.core.errors import (
    MismatchError,
)
from fedft.core.record.rundir import RunDir
from fedft.core.spec import LoraSpec, TaskSpec
from fedft.core.text.special_tokens import SpecialTokens, TextEncoder
from fedft.core.types import Adapter, Delta, ServerState
from fedft.server import starting
from fedft.server.clock import SimulatedClock
from fedft.server.config import RunConfig
from fedft.server.federation import Federation
from fedft.server.grids.base import JobGrid
from fedft.server.grids.inline import InlineGrid
from fedft.server.inputs import check_rank, check_training, data_of
from fedft.server.messages import Courier
from fedft.server.outside import outside
from fedft.server.preflight import preflight
from fedft.server.pruning import pruning_of
from fedft.server.sampling import SimulatedRoster
from fedft.server.validation import Limits
from fedft.strategies.blame import blamed
from fedft.trackers import Tracker

CLIENT_APP = "fedft.clients.app:app"
"""The client side, by reference: the server never imports it."""


class StatefulGrid(Courier, Protocol):
    """A grid that lends out the states of its sites, to be committed with the rounds.

    See :class:`~fedft.server.grids.base.JobGrid`.
    """

    def touched_states(self) -> dict[int, RecordDict | None]:
        """Node id → the state it has now, where that changed since it was committed."""
        ...

    def states_committed(self, nodes: Iterable[int]) -> None:
        """The present states of these nodes are on disk."""
        ...

    def load_states(self, states: Mapping[int, RecordDict]) -> None:
        """Put the states of a checkpoint in place."""
        ...


@dataclass(frozen=True, eq=False)
class Setting:
    """What a run works on: loaded once, before the first round. ``start``: the adapter to go on from."""

    config: RunConfig
    task: TaskSpec
    data: Data
    manifest: Manifest
    shapes: models.Schema
    folder: Path
    hashes: Mapping[str, str]
    special: SpecialTokens | None
    start: Adapter | None = None


def open_grid(config: RunConfig) -> JobGrid:
    """The workers of a simulation; they come up in the background.

    Raises:
        EnvironmentFailure: the base is to be held in few bits, which these workers cannot.
    """
    engine = config.engine
    if config.model.load_in is not None:
        models.check_quantized(config.model.load_in, "cuda" if engine.gpus_per_worker else "cpu")
    if engine.backend == "inline":
        torch.set_num_threads(engine.threads)
        return InlineGrid(CLIENT_APP, config.fleet.clients)
    if engine.backend == "processes":
        from fedft.server.grids.processes import ProcessGrid

        return ProcessGrid(
            CLIENT_APP,
            config.fleet.clients,
            workers=engine.workers,
            threads=engine.threads,
            imports=[CLIENT_APP.partition(":")[0], *models.imports(config.model)],
        )
    from fedft.server.grids.ray import RayGrid

    return RayGrid(
        CLIENT_APP,
        config.fleet.clients,
        workers=engine.workers,
        threads=engine.threads,
        gpus_per_worker=engine.gpus_per_worker,
        address=engine.ray_address,
    )


def prepare_run(config: RunConfig, run: RunDir) -> Setting:
    """Load what a run works on; freeze the partition and record the surroundings at its start.

    Raises:
        MismatchError: model or data are not there, or not those that the run started with.
    """
    folder = models.resolve(config.model)
    encoder = models.input_encoder(config.model, folder)
    data = data_of(config, encoder)
    shapes = models.schema(config.model, config.lora, len(data.classes))
    check_rank(config, shapes)
    check_training(config, data, shapes)
    hashes = models.fingerprint(folder)
    inputs = {**hashes, "data": data.fingerprint}
    if (availability := config.availability) is not None:
        inputs["availability"] = availability.fingerprint
    kept = starting.kept(config, run)
    if kept is not None:
        inputs["start"] = starting.digest(kept)
    special = None
    if isinstance(encoder, TextEncoder):
        run.keep_tokenizer(encoder.files())
        special = encoder.special
    manifest = _frozen_partition(config, run, data, inputs, special)
    task = config.task(
        lora=_pinned(config, shapes),
        run_id=run.path.name,
        precision=config.engine.precision,
        cohort=config.engine.cohort,
        device="cuda" if config.engine.gpus_per_worker else "cpu",
        manifest=str(run.partition),
        fingerprint=manifest.fingerprint,
    )
    start = None if kept is None else starting.read(config, shapes, kept)
    return Setting(config, task, data, manifest, shapes, folder, hashes, special, start)


def _pinned(config: RunConfig, shapes: models.Schema) -> LoraSpec:
    """The adapter with the layers by name that ``auto`` stands for: no client decides it anew."""
    lora = config.lora.model_copy(update={"start": None})  # a folder of the server's
    if lora.target_modules != "auto":
        return lora
    return lora.model_copy(update={"target_modules": shapes.names})


def tried(
    setting: Setting,
    run: RunDir,
    grid: Courier,
    told: Tracker,
    stop: Callable[[], bool],
) -> Setting:
    """The same, with the engine that its model can be trained in; recorded once, kept ever after.

    Raises:
        MismatchError: the model cannot be trained on these data, in no engine.
        EnvironmentFailure: a worker died over it.
    """
    known = run.environment().get("engine")
    if known is None:
        found = preflight(
            grid, setting.task.model_dump_json(), setting.config.training.batch_size, stop
        )
        known = vars(found)
        run.amend_environment({"engine": known})
    if known["why"]:
        told.note(f"clients are trained one by one, in the plain loop: {known['why']}")
    if known["engine"] == "cohort" or setting.task.cohort == 1:
        return setting
    return replace(setting, task=setting.task.model_copy(update={"cohort": 1}))


def _facts(config: RunConfig, data: Data, special: SpecialTokens | None) -> dict[str, object]:
    text = {} if special is None else {"cut": dict(data.cut), "special_tokens": special.facts()}
    return {
        "device": "cuda" if config.engine.gpus_per_worker else "cpu",
        "classes": list(data.classes),
        "examples": {"train": len(data.train), "test": len(data.test)},
        "skipped": dict(data.skipped),
        "notes": list(data.notes),
        **config.evaluation.described(),
        "metrics": [asdict(metric) for metric in config.judged.declared],
        **text,
    }


def _frozen_partition(
    config: RunConfig,
    run: RunDir,
    data: Data,
    inputs: dict[str, str],
    special: SpecialTokens | None,
) -> Manifest:
    """The run's manifest: built, saved and recorded once, loaded and verified ever after.

    Before the first round "ever after" has not begun: the data may have been mended since.
    """
    if run.begun and (recorded := run.environment().get("hashes")):
        _check_inputs(recorded, inputs)
        manifest = partition.load(run.partition, recorded["partition"])
        manifest.verify()
        return manifest
    manifest = partition.divided(config.data.partition, data, config.fleet.clients, config.seed)
    manifest.save(run.partition)
    facts = _facts(config, data, special)
    if code := outside(config):
        facts["plugins"] = code
    run.write_environment({**inputs, "partition": manifest.fingerprint}, facts)
    return partition.load(run.partition)  # mapped: a million sites leave the memory again


def _check_inputs(then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """The base model, the tokenizer and the data must be those that the run started with."""
    for what, digest in now.items():
        if then[what] != digest:
            raise MismatchError(
                f"the {what.replace('_', ' ')} is not that of this run: hash {digest[:12]}, "
                f"was {then[what][:12]}",
                fix="Put the original back, or start a new run.",
            )


def first_state(
    config: RunConfig, shapes: models.Schema, classes: int = 0, start: Adapter | None = None
) -> ServerState:
    """The state before the first round; ``start`` is the adapter to go on from, if there is one.

    Some adapters start from the base weights themselves, which are loaded for it and let go of:
    see :func:`fedft.core.models.start.drawn`.
    """
    lora, rule = config.lora, config.rule(classes)
    if start is None:
        initial = models.initial_adapter(shapes, lora, config.rank, config.seed)
    else:
        initial = start
    delta: Delta = {}
    if start is None and family_of(lora).draws(lora):
        from fedft.core.models.start import drawn  # peft takes a second to import

        initial, delta = drawn(config.model, lora, initial, config.seed)
    with blamed(rule, "starting"):
        state = rule.init(initial)
    return replace(state, delta=delta) if delta else state


def federate(setting: Setting, grid: Courier, stop: Callable[[], bool]) -> Federation:
    """Everything the rounds need, unpacked from the configuration."""
    config = setting.config
    geometry = models.geometry(config.model, setting.folder)
    pruning, budgets = pruning_of(config, setting.shapes, geometry)
    devices = replace(config.devices, memory_mib=budgets)
    roster = SimulatedRoster(setting.manifest, config.data.holdout, devices)
    return Federation(
        strategy=config.rule(len(setting.data.classes)),
        roster=roster,
        grid=grid,
        task=setting.task.model_dump_json(),
        training=config.training.local(config.rounds.count),
        terms=config.training.terms(),
        settings=config.rounds,
        seed=config.seed,
        kind=config.judged,
        classes=len(setting.data.classes),
        cohort=setting.task.cohort,
        compressor=config.engine.compressor,
        limits=Limits(update_norm=config.engine.max_update_norm),
        holdout=config.data.holdout > 0,
        clock=simulated_clock(config, roster),
        pruning=pruning,
        frozen=config.frozen,
        stop=stop,
        meters=config.evaluation.kinds,
    )


def simulated_clock(config: RunConfig, roster: SimulatedRoster) -> SimulatedClock | None:
    """The clock of the fleet; None where devices take no time and can always be reached.

    Raises:
        FedftError: devices or availability are not about the registered sites.
    """
    roster.fleet.check(roster.manifest)
    if not config.fleet.timed:
        return None
    availability = config.availability
    if availability is not None:
        availability.check(roster.manifest)
    return SimulatedClock(
        roster, config.seed, config.engine.compressor, availability, config.rounds.deadline_s
    )
