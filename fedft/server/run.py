"""One simulated run, from a validated configuration to a finished run directory.

The order of things is the order of this file: claim the directory, start the workers, load the
data and freeze the partition while they come up, then consume rounds, committing each before the
next one starts.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from flwr.app import RecordDict

from fedft.core import models
from fedft.core.adapters.files import save_adapter, save_mixture, save_whole
from fedft.core.card import Origin, save_card
from fedft.core.data import partition
from fedft.core.data.partition import Manifest
from fedft.core.data.source import Data
from fedft.core.digest import adapter_digest, state_digest
from fedft.core.errors import (
    ConfigError,
    EnvironmentFailure,
    IntegrityError,
    Interrupted,
    MismatchError,
    QuorumFailure,
    SecurityRefusal,
)
from fedft.core.files import disk
from fedft.core.metrics import better
from fedft.core.record.rundir import RunDir
from fedft.core.spec import LoraSpec, Precision, TaskSpec
from fedft.core.text.special_tokens import SpecialTokens, TextEncoder
from fedft.core.types import ServerState
from fedft.core.wire import codec
from fedft.server.asynchrony import updates
from fedft.server.checkpoints import Checkpoints
from fedft.server.clock import SimulatedClock
from fedft.server.config import RunConfig, differences, parse_toml
from fedft.server.federation import Completed, Federation
from fedft.server.grids.base import SimulationGrid
from fedft.server.grids.inline import InlineGrid
from fedft.server.inputs import check_rank, data_of, remarks
from fedft.server.messages import Courier
from fedft.server.preflight import preflight
from fedft.server.privacy import PrivacyAccount, check_fork, open_account, resolved_privacy
from fedft.server.pruning import pruning_of
from fedft.server.rounds import rounds
from fedft.server.sampling import SimulatedRoster
from fedft.server.validation import Limits

CLIENT_APP = "fedft.clients.app:app"
"""The client side, by reference: the server never imports it."""

COHORT_TOKENS = 1536
"""Tokens that one pass of the cohort engine is filled with when ``engine.cohort = "auto"``: where
its speed levels off on a CPU, as benchmarks/cohort.py shows."""


class Observer(Protocol):
    """What watches a run: a progress bar, plain lines, nothing."""

    def started(self, run: RunDir, config: RunConfig, state: ServerState) -> None:
        """The workers are up, and rounds begin."""
        ...

    def completed(self, record: Mapping[str, Any]) -> None:
        """A round is committed; ``record`` is its line in ``rounds.jsonl``."""
        ...

    def note(self, text: str) -> None:
        """Something the user should know."""
        ...


class StatefulGrid(Courier, Protocol):
    """A grid that lends out the states of its sites, to be committed with the rounds.

    See :class:`~fedft.server.grids.base.SimulationGrid`.
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


class Silent:
    """Watches nothing."""

    def started(self, run: RunDir, config: RunConfig, state: ServerState) -> None:
        """See :class:`Observer`."""

    def completed(self, record: Mapping[str, Any]) -> None:
        """See :class:`Observer`."""

    def note(self, text: str) -> None:
        """See :class:`Observer`."""


@dataclass(frozen=True)
class Progress:
    """What the commit of a round remembers beside the state.

    Attributes:
        best: line of the best evaluation so far, with its ``round``; None before the first.
        final: the newest evaluation.
        stale: evaluations since the best one.
        up, down: bytes so far.
        seconds: spent in rounds so far.
        history: digest over the states of all rounds so far; proves that two runs went the same way.
    """

    best: dict[str, float] | None = None
    final: dict[str, float] | None = None
    stale: int = 0
    up: int = 0
    down: int = 0
    seconds: float = 0.0
    history: str = ""

    def after(self, completed: Completed, task: str) -> "Progress":
        """With one more round."""
        record = completed.record
        scores = record.get("eval")
        improved = scores is not None and better(task, scores, self.best)
        return Progress(
            best={"round": record["round"], **scores} if scores and improved else self.best,
            final=scores or self.final,
            stale=0 if improved else self.stale + (scores is not None),
            up=self.up + record["bytes"]["up"],
            down=self.down + record["bytes"]["down"],
            seconds=self.seconds + sum(record["seconds"].values()),
            history=_chained(self.history, state_digest(completed.state)),
        )


def _chained(history: str, digest: str) -> str:
    return hashlib.sha256(f"{history}{digest}".encode()).hexdigest()


def simulate(
    config: RunConfig,
    run_dir: Path | None = None,
    *,
    observer: Observer | None = None,
    stop: Callable[[], bool] = lambda: False,
    grid: StatefulGrid | None = None,
    evaluator: Courier | None = None,
) -> RunDir:
    """Simulate a federation from the beginning.

    Args:
        config: validated.
        run_dir: an absent or empty folder; None makes ``runs/<time>-<strategy>``.
        observer: is told about rounds as they are committed.
        stop: is asked between replies whether to stop.
        grid: workers to use and leave running; None starts its own and ends them.
        evaluator: see :class:`~fedft.server.federation.Federation`.

    Returns:
        The finished run.

    Raises:
        FedftError: see :mod:`fedft.core.errors`. Committed rounds are never lost.
    """
    config = resolved(config)
    text = config.to_toml()
    with RunDir.create(run_dir, hint=config.strategy.name, again=text) as run, leaving_nothing(run):
        run.write_config(text)
        with _resumable(run):
            return _execute(config, run, observer or Silent(), stop, grid, evaluator)


def resume(
    run_dir: Path,
    *,
    changed: RunConfig | None = None,
    observer: Observer | None = None,
    stop: Callable[[], bool] = lambda: False,
    grid: StatefulGrid | None = None,
) -> RunDir:
    """Go on with a run from its last committed round; a finished run is returned as it is.

    Args:
        run_dir: its directory.
        changed: a configuration to go on with; it must say the same, apart from ``[engine]``
            ``backend``, ``workers``, ``gradient-checkpointing`` and ``verify``, which do not change results.
        observer: as for :func:`simulate`.
        stop: as for :func:`simulate`.
        grid: as for :func:`simulate`.

    Raises:
        ConfigError: ``changed`` differs; the message lists the keys.
    """
    observer = observer or Silent()
    with RunDir.open(run_dir, writing=True) as run:
        config = parse_toml(run.config, str(run.path / "config.toml"))
        if (run.path / "identity").exists():
            raise ConfigError(
                f"{run.path} is a run of real clients; resuming it here would simulate them",
                fix=f"Go on with it by the command that started it: fedft serve CONFIG --run-dir {run.path}",
            )
        if changed is not None:
            config = _same_run(config, resolved(changed))
        for package, (then, now) in run.changed_versions().items():
            observer.note(
                f"{package} was {then} and is {now}: the rest of this run is not bit-exact"
            )
        if run.finished:
            observer.note("this run is finished; nothing to resume")
            return run
        with _resumable(run):
            return _execute(config, run, observer, stop, grid)


@contextmanager
def leaving_nothing(run: RunDir) -> Iterator[None]:
    """A model, data or configuration that no round can be run with leave nothing behind.

    What cannot be resumed must not stand in the way of the same command, once all is mended.
    """
    try:
        yield
    except (ConfigError, MismatchError, SecurityRefusal):
        if not run.begun:
            run.discard()
        raise


@contextmanager
def _resumable(run: RunDir) -> Iterator[None]:
    """Errors after which the run can go on say how."""
    try:
        yield
    except (EnvironmentFailure, Interrupted, QuorumFailure) as pause:
        how = f"Go on with: fedft resume {run.path}"
        pause.fix = f"{pause.fix} {how}" if pause.fix else how
        raise


_FORKABLE = ("rounds", "training", "strategy", "engine")


def fork(run_dir: Path, target: Path, changed: RunConfig | None) -> Path:
    """A new run that starts from the last committed round of another, with changes.

    Args:
        run_dir: the old run; it is only read.
        target: an absent or empty folder for the new one.
        changed: its configuration; model, adapter, data, fleet and seed must stay the same,
            because the state only means something on them.

    Raises:
        ConfigError: a change that the state, or the account of a private run, cannot follow.
    """
    with RunDir.open(run_dir) as old:
        config = parse_toml(old.config, str(run_dir))
        new = resolved(changed) if changed is not None else config
        lines = differences(config, new)
        fixed = [line for line in lines if not line.startswith(tuple(f"[{t}" for t in _FORKABLE))]
        if fixed:
            raise ConfigError(
                "a fork goes on from trained tensors, and these changes need a new run:\n  "
                + "\n  ".join(fixed),
                fix=f"Only {', '.join(_FORKABLE)} may change in a fork.",
            )
        check_fork(config, new)
        with RunDir.create(target) as run:
            for line in old.releases():
                run.append_release(line)
            for folder in (old.checkpoints, old.partition, old.adapters):
                if folder.exists():
                    shutil.copytree(folder, run.path / folder.name)
            for record in old.clients():
                run.append_client(record)
            for record in old.rounds():
                run.append_round(record)
            shutil.copyfile(old.path / "environment.json", run.path / "environment.json")
            run.write_config(new.to_toml())
            return run.path


def _same_run(old: RunConfig, new: RunConfig) -> RunConfig:
    names = ("backend", "workers", "gradient_checkpointing", "verify")
    free = {name: getattr(new.engine, name) for name in names}
    moved = old.model_copy(update={"engine": old.engine.model_copy(update=free)})
    if lines := differences(moved, new):
        raise ConfigError(
            "the configuration is not the one this run was started with:\n  " + "\n  ".join(lines),
            fix="Resume without changes, or start a new run from the changed configuration.",
        )
    return moved


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
    row = max(1, config.data.max_length // 8)
    fits = max(1, COHORT_TOKENS // (row * config.training.batch_size))
    pairs = -(-config.rounds.per_round // (2 * fits))
    return -(-config.rounds.per_round // (2 * pairs))


@dataclass(frozen=True, eq=False)
class Setting:
    """What a run works on: loaded once, before the first round."""

    config: RunConfig
    task: TaskSpec
    data: Data
    manifest: Manifest
    shapes: models.Schema
    folder: Path
    hashes: Mapping[str, str]
    special: SpecialTokens | None


def _execute(
    config: RunConfig,
    run: RunDir,
    observer: Observer,
    stop: Callable[[], bool],
    workers: StatefulGrid | None,
    evaluator: Courier | None = None,
) -> RunDir:
    with ExitStack() as stack:
        grid = workers if workers is not None else stack.enter_context(open_grid(config))
        setting = prepare_run(config, run)
        setting = tried(setting, run, evaluator or grid, observer, stop)
        federation = replace(federate(setting, grid, stop), evaluator=evaluator)
        complete(setting, run, grid, federation, observer)
    return run


def complete(
    setting: Setting, run: RunDir, grid: StatefulGrid, federation: Federation, observer: Observer
) -> None:
    """Go through the rounds that are left, from the last committed one, and write the summary."""
    config = setting.config
    checkpoints = Checkpoints(run.checkpoints, keep=config.rounds.keep_checkpoints)
    state, progress = _restore(setting, run, grid, checkpoints, observer)
    account = open_account(config, run, federation.roster, state.round)
    federation = replace(federation, privacy=account)
    for remark in remarks(config, setting.data, setting.special):
        observer.note(remark)
    observer.started(run, config, state)
    for completed in _until_patience(federation, state, progress):
        state = completed.state
        progress = progress.after(completed, config.model.task)
        _commit(setting, run, grid, checkpoints, completed, progress)
        observer.completed(completed.record)
    verified = _verified(setting, run, federation, state)
    _finish(setting, run, state, progress, account, verified)


def _verified(
    setting: Setting, run: RunDir, federation: Federation, state: ServerState
) -> dict[str, float] | None:
    """What :func:`fedft.server.verify.verify` finds; None where it was not asked, or has no say.

    A base in few bits is not what stock transformers loads.
    """
    config = setting.config
    if not config.engine.verify or config.model.load_in is not None:
        return None
    from fedft.server.verify import verify  # peft takes a second to import

    gated = config.lora.method == "hydralora"  # what of it stock peft can load is another model
    with tempfile.TemporaryDirectory() as spare:
        folder = run.adapter(state.round)
        if not folder.exists():
            folder = Path(spare) / "adapter"
            export(setting, state, folder)
        return verify(
            folder,
            state,
            grid=federation.evaluator or federation.grid,
            task=federation.task,
            model=config.model,
            folder=setting.folder,
            classes=len(setting.data.classes),
            head=setting.shapes.saved,
            test=setting.data.test.subset(np.arange(0)) if gated else setting.data.test,
            precision=setting.task.precision,
            special=setting.special,
            stop=federation.stop,
        )


def open_grid(config: RunConfig) -> SimulationGrid:
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
    hashes = models.fingerprint(folder)
    inputs = {**hashes, "data": data.fingerprint}
    if (availability := config.availability) is not None:
        inputs["availability"] = availability.fingerprint
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
    return Setting(config, task, data, manifest, shapes, folder, hashes, special)


def _pinned(config: RunConfig, shapes: models.Schema) -> LoraSpec:
    """The adapter with the layers by name that ``auto`` stands for: no client decides it anew."""
    if config.lora.target_modules != "auto":
        return config.lora
    return config.lora.model_copy(update={"target_modules": shapes.names})


def tried(
    setting: Setting,
    run: RunDir,
    grid: Courier,
    observer: Observer,
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
        observer.note(f"clients are trained one by one, in the plain loop: {known['why']}")
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
    manifest = partition.build(
        config.data.partition,
        examples=len(data.train),
        clients=config.fleet.clients,
        seed=config.seed,
        labels=data.train.labels,
        owners=data.owners,
    )
    manifest.save(run.partition)
    facts = _facts(config, data, special)
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


def _restore(
    setting: Setting,
    run: RunDir,
    grid: StatefulGrid,
    checkpoints: Checkpoints,
    observer: Observer,
) -> tuple[ServerState, Progress]:
    """The state to go on from: the newest intact checkpoint, or the seed's initial adapter."""
    checkpoint = checkpoints.load()
    if checkpoint is None:
        if any(line["round"] > 1 for line in run.rounds()):
            raise IntegrityError(
                f"{run.path} has lines of completed rounds, and no checkpoint of any",
                fix="Restore the checkpoints folder from a copy, or start the run anew elsewhere.",
            )
        run.truncate_to(0)
        grid.load_states({})
        config = setting.config
        if config.one_by_one:
            observer.note("sites are trained one by one: the cohort engine takes plain LoRA only")
        return first_state(config, setting.shapes), Progress()
    for note in checkpoint.notes:
        observer.note(note)
    run.truncate_to(checkpoint.state.round)
    indices = {name: setting.manifest.index_of(name) for name in checkpoints.sites}
    grid.load_states(
        {
            index + 1: RecordDict({codec.KEPT: codec.arrays_from(checkpoints.sites[name])})
            for name, index in indices.items()
        }
    )
    return checkpoint.state, Progress(**checkpoint.extra)


def first_state(config: RunConfig, shapes: models.Schema) -> ServerState:
    """The state before the first round.

    Some adapters start from the base weights themselves, which are loaded for it and let go of:
    see :func:`fedft.core.models.start.drawn`.
    """
    lora = config.lora
    initial = models.initial_adapter(shapes, lora, config.rank, config.seed)
    if not lora.whole and lora.init == "default":
        return config.strategy.init(initial)
    from fedft.core.models.start import drawn  # peft takes a second to import

    adapter, delta = drawn(config.model, lora, initial, config.seed)
    return replace(config.strategy.init(adapter), delta=delta)


def federate(setting: Setting, grid: Courier, stop: Callable[[], bool]) -> Federation:
    """Everything the rounds need, unpacked from the configuration."""
    config = setting.config
    geometry = models.geometry(config.model, setting.folder)
    pruning, budgets = pruning_of(config, setting.shapes, geometry)
    devices = replace(config.devices, memory_mib=budgets)
    roster = SimulatedRoster(setting.manifest, config.data.holdout, devices)
    return Federation(
        strategy=config.strategy,
        roster=roster,
        grid=grid,
        task=setting.task.model_dump_json(),
        training=config.training.local(),
        settings=config.rounds,
        seed=config.seed,
        kind=config.model.task,
        cohort=setting.task.cohort,
        wire=config.engine.wire,
        limits=Limits(update_norm=config.engine.max_update_norm),
        holdout=config.data.holdout > 0,
        clock=simulated_clock(config, roster),
        pruning=pruning,
        frozen=config.frozen,
        stop=stop,
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
        roster, config.seed, config.engine.wire, availability, config.rounds.deadline_s
    )


def _until_patience(
    federation: Federation, state: ServerState, progress: Progress
) -> Iterator[Completed]:
    """The rounds to come, ending early when evaluations stop improving."""
    patience = federation.settings.patience
    if patience is not None and progress.stale >= patience:
        return
    steps = rounds if federation.strategy.buffer is None else updates
    for completed in steps(federation, state):
        yield completed
        progress = progress.after(completed, federation.kind)
        if patience is not None and progress.stale >= patience:
            return


def _commit(
    setting: Setting,
    run: RunDir,
    grid: StatefulGrid,
    checkpoints: Checkpoints,
    completed: Completed,
    progress: Progress,
) -> None:
    """Make a round durable: its lines, its adapter where one is due, then its checkpoint."""
    start = time.monotonic()
    state = completed.state
    if "eval" in completed.record:
        export(setting, state, run.adapter(state.round))
    touched = grid.touched_states()
    sites = {
        setting.manifest.name_of(node - 1): codec.tensors_from(record.array_records[codec.KEPT])
        for node, record in touched.items()
        if record is not None
    }
    for reply in completed.replies:
        run.append_client(reply)
    completed.record["seconds"]["commit"] = time.monotonic() - start
    run.append_round(completed.record)
    checkpoints.commit(state, sites, vars(progress))
    grid.states_committed(touched)
    if "eval" in completed.record:
        _drop_superseded(setting, run, progress)


def _drop_superseded(setting: Setting, run: RunDir, progress: Progress) -> None:
    """Keep the adapters of the best and of the newest evaluation only, unless all are wanted.

    Not before the round is committed: the adapter that was the best until then goes here.
    """
    if setting.config.rounds.keep_adapters:
        return
    exported = run.exported()
    wanted = {*exported[-1:], *([int(progress.best["round"])] if progress.best else [])}
    for round_ in set(exported) - wanted:
        with disk(f"remove {run.adapter(round_)}"):
            shutil.rmtree(run.adapter(round_))


def export(setting: Setting, state: ServerState, folder: Path) -> None:
    """Write a state's global adapter as PEFT does, with a card that says what it is."""
    config, head = setting.config, setting.shapes.saved
    classes = len(setting.data.classes)
    about: dict[str, Any] = {
        "base": config.model.source,
        "head": head,
        "beside": models.frozen_values(config.model, classes, head),
    }
    whole: dict[str, Any] = {"model": config.model, "lora": config.lora}
    if config.lora.method == "hydralora":
        save_mixture(folder, state.adapter, classes=classes, **whole, **about)
    elif config.lora.whole:
        from fedft.core.models.start import frozen_tensors  # peft takes a second to import

        frozen, targets = frozen_tensors(config.model, config.lora, config.seed)
        own = {"seed": config.seed, "targets": targets, "frozen": frozen}
        save_whole(folder, state.adapter, **own, **whole, **about)
    else:
        save_adapter(
            folder,
            state.adapter,
            state.delta,
            task=config.model.task,
            revision=config.model.revision,
            transposed=setting.shapes.transposed,
            **about,
        )
    origin = Origin(
        config.model,
        setting.hashes,
        setting.data.classes,
        config.strategy.name,
        state.round,
        config.lora.method,
    )
    save_card(folder, origin)


def _finish(
    setting: Setting,
    run: RunDir,
    state: ServerState,
    progress: Progress,
    account: PrivacyAccount | None,
    verified: Mapping[str, float] | None,
) -> None:
    _drop_superseded(setting, run, progress)  # where a crash came between commit and removal
    run.write_summary(
        {
            "status": "finished" if state.round == setting.config.rounds.count else "stopped early",
            "rounds": state.round,
            "final": progress.final,
            "best": progress.best,
            "bytes": {"up": progress.up, "down": progress.down},
            "seconds": progress.seconds,
            "adapter_sha256": adapter_digest(state.adapter, state.delta),
            "history_sha256": progress.history,
            "verified": verified,
            **({} if account is None else {"privacy": account.guarantee()}),
        }
    )
