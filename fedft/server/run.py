"""One simulated run, from a validated configuration to a finished run directory.

The order of things is the order of this file: claim the directory, start the workers, load the
data and freeze the partition while they come up, then consume rounds, committing each before the
next one starts.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from flwr.app import RecordDict

from fedft.core.adapters import family_of
from fedft.core.digest import adapter_digest
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
from fedft.core.plugins import RECORD, Trust, short_name
from fedft.core.record.lines import Scores, Summary, Verified
from fedft.core.record.rundir import RunDir
from fedft.core.types import ServerState
from fedft.core.wire import codec
from fedft.server import evaluation
from fedft.server.asynchrony import updates
from fedft.server.checkpoints import Checkpoints
from fedft.server.config import RunConfig
from fedft.server.config_file import differences, parse_toml
from fedft.server.export import export
from fedft.server.federation import Completed, Federation, Stopwatch
from fedft.server.inputs import remarks
from fedft.server.messages import Courier, Waiting
from fedft.server.outside import changes, outside
from fedft.server.privacy import PrivacyAccount, check_fork, open_account
from fedft.server.progress import Progress
from fedft.server.resolve import resolved
from fedft.server.rounds import rounds
from fedft.server.setting import (
    Setting,
    StatefulGrid,
    federate,
    first_state,
    open_grid,
    prepare_run,
    tried,
)
from fedft.trackers import Start, Tracker, found
from fedft.trackers.run_directory import RunDirectory
from fedft.trackers.told import Told


def simulate(
    config: RunConfig,
    run_dir: Path | None = None,
    *,
    trackers: Sequence[Tracker] = (),
    stop: Callable[[], bool] = lambda: False,
    grid: StatefulGrid | None = None,
    evaluator: Courier | None = None,
) -> RunDir:
    """Simulate a federation from the beginning.

    Args:
        config: validated.
        run_dir: an absent or empty folder; None makes ``runs/<time>-<strategy>``.
        trackers: are told of the run, beside those of ``[track]``; none of them can end it.
        stop: is asked between replies whether to stop.
        grid: workers to use and leave running; None starts its own and ends them.
        evaluator: see :class:`~fedft.server.federation.Federation`.

    Returns:
        The finished run.

    Raises:
        FedftError: see :mod:`fedft.core.errors`. Committed rounds are never lost.
    """
    config = resolved(config)
    text, hint = config.to_toml(), short_name(config.strategy.name)
    with (
        telling(trackers, config) as told,
        RunDir.create(run_dir, hint=hint, again=text) as run,
        leaving_nothing(run),
    ):
        run.write_config(text)
        with _resumable(run):
            return _execute(config, run, told, stop, grid, evaluator)


def resume(
    run_dir: Path,
    *,
    changed: RunConfig | None = None,
    trackers: Sequence[Tracker] = (),
    stop: Callable[[], bool] = lambda: False,
    grid: StatefulGrid | None = None,
    trust: Trust = RECORD,
) -> RunDir:
    """Go on with a run from its last committed round; a finished run is returned as it is.

    Args:
        run_dir: its directory.
        changed: a configuration to go on with; it must say the same, apart from ``[engine]``
            ``backend``, ``workers``, ``gradient-checkpointing`` and ``verify``, and from ``[track]``,
            which do not change results.
        trackers: as for :func:`simulate`.
        stop: as for :func:`simulate`.
        grid: as for :func:`simulate`.
        trust: what may be imported because the run directory names it.

    Raises:
        ConfigError: ``changed`` differs; the message lists the keys.
        SecurityRefusal: the run is of code from outside of fedft that is not trusted.
    """
    with RunDir.open(run_dir, writing=True) as run:
        config = parse_toml(run.config, str(run.path / "config.toml"), trust)
        if (run.path / "identity").exists():
            raise ConfigError(
                f"{run.path} is a run of real clients; resuming it here would simulate them",
                fix=f"Go on with it by the command that started it: fedft serve CONFIG --run-dir {run.path}",
            )
        if changed is not None:
            config = _same_run(config, resolved(changed))
        with telling(trackers, None if run.finished else config) as told:
            for package, (then, now) in run.changed_versions().items():
                told.note(
                    f"{package} was {then} and is {now}: the rest of this run is not bit-exact"
                )
            for note in changes(run.environment().get("plugins"), config):
                told.note(note)
            if run.finished:
                told.note("this run is finished; nothing to resume")
                return run
            with _resumable(run):
                return _execute(config, run, told, stop, grid)


@contextmanager
def telling(trackers: Sequence[Tracker], config: RunConfig | None) -> Iterator[Told]:
    """Tells some trackers of a run, and closes them in the end.

    Args:
        trackers: that somebody handed over.
        config: of the run, whose ``[track]`` names more; None where there is nothing for them to hear.

    Raises:
        FedftError: one of those that are named cannot be had.
    """
    named = () if config is None else config.track.trackers
    told = Told([*trackers, *(found(name)() for name in named)])
    try:
        yield told
    finally:
        told.close()


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


_FORKABLE = ("rounds", "training", "strategy", "engine", "track")


def fork(run_dir: Path, target: Path, changed: RunConfig | None, trust: Trust = RECORD) -> Path:
    """A new run that starts from the last committed round of another, with changes.

    Args:
        run_dir: the old run; it is only read.
        target: an absent or empty folder for the new one.
        changed: its configuration; model, adapter, data, fleet and seed must stay the same,
            because the state only means something on them.
        trust: as for :func:`resume`.

    Raises:
        ConfigError: a change that the state, or the account of a private run, cannot follow.
    """
    with RunDir.open(run_dir) as old:
        config = parse_toml(old.config, str(run_dir), trust)
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
            for folder in (old.checkpoints, old.partition, old.adapters, old.start):
                if folder.exists():
                    shutil.copytree(folder, run.path / folder.name)
            for record in old.clients():
                run.append_client(record)
            for record in old.rounds():
                run.append_round(record)
            shutil.copyfile(old.path / "environment.json", run.path / "environment.json")
            if code := outside(new):
                run.amend_environment({"plugins": code})
            run.write_config(new.to_toml())
            return run.path


def _same_run(old: RunConfig, new: RunConfig) -> RunConfig:
    names = ("backend", "workers", "gradient_checkpointing", "verify")
    free = {name: getattr(new.engine, name) for name in names}
    engine = old.engine.model_copy(update=free)
    moved = old.model_copy(update={"engine": engine, "track": new.track})
    if lines := differences(moved, new):
        raise ConfigError(
            "the configuration is not the one this run was started with:\n  " + "\n  ".join(lines),
            fix="Resume without changes, or start a new run from the changed configuration.",
        )
    return moved


def _execute(
    config: RunConfig,
    run: RunDir,
    told: Tracker,
    stop: Callable[[], bool],
    workers: StatefulGrid | None,
    evaluator: Courier | None = None,
) -> RunDir:
    with ExitStack() as stack:
        grid = workers if workers is not None else stack.enter_context(open_grid(config))
        setting = prepare_run(config, run)
        setting = tried(setting, run, evaluator or grid, told, stop)
        federation = replace(
            federate(setting, grid, stop), evaluator=evaluator, scoring=_scoring(told)
        )
        complete(setting, run, grid, federation, told)
    return run


def _scoring(told: Tracker) -> Callable[[Waiting | None], None]:
    def scoring(now: Waiting | None) -> None:
        told.scoring("" if now is None else f"{now.what}: {now.done} of {now.wanted} {now.verb}")

    return scoring


def complete(
    setting: Setting, run: RunDir, grid: StatefulGrid, federation: Federation, told: Tracker
) -> None:
    """Go through the rounds that are left, from the last committed one, to the summary.

    The run directory hears of a round before it is committed, and of the end after everybody else.
    """
    config = setting.config
    checkpoints = Checkpoints(run.checkpoints, keep=config.rounds.keep_checkpoints)
    state, progress = _restore(setting, run, grid, checkpoints, told)
    account = open_account(config, run, federation.roster, state.round)
    federation = replace(federation, privacy=account)
    for remark in remarks(config, setting.data, setting.special):
        told.note(remark)
    directory, start = RunDirectory(run), _start(config, run, state.round)
    directory.started(start)
    told.started(start)
    for completed in _with_start(federation, state, progress, before=config.evaluation.before):
        state = completed.state
        progress = progress.after(completed, federation.kind)
        _commit(setting, run, directory, grid, checkpoints, completed, progress)
        told.round(completed.record, completed.replies)
    verified = _verified(setting, run, federation, state)
    _drop_superseded(setting, run, progress)  # where a crash came between commit and removal
    summary = _summary(config, state, progress, account, verified)
    told.finished(summary)
    directory.finished(summary)


def _start(config: RunConfig, run: RunDir, round_: int) -> Start:
    """What trackers begin with, after so many committed rounds."""
    tables = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    return Start(run.path, run.trackers, tables, run.rounds(until=round_))


def _verified(
    setting: Setting, run: RunDir, federation: Federation, state: ServerState
) -> Verified | None:
    """What :func:`fedft.server.verify.verify` finds; None where it was not asked, or has no say.

    A base in few bits is not what stock transformers loads.
    """
    config = setting.config
    if not config.engine.verify or config.model.load_in is not None:
        return None
    from fedft.server.verify import verify  # peft takes a second to import

    stock = family_of(config.lora).stock
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
            judged=federation.kind,
            folder=setting.folder,
            classes=setting.data.classes,
            head=setting.shapes.saved,
            test=setting.data.test if stock else setting.data.test.subset(np.arange(0)),
            precision=setting.task.precision,
            special=setting.special,
            stop=federation.stop,
        )


def _restore(
    setting: Setting,
    run: RunDir,
    grid: StatefulGrid,
    checkpoints: Checkpoints,
    told: Tracker,
) -> tuple[ServerState, Progress]:
    """The state to go on from: the newest intact checkpoint, or the seed's initial adapter."""
    checkpoint = checkpoints.load()
    if checkpoint is None:
        if any(line["round"] > 1 for line in run.rounds()):
            raise IntegrityError(
                f"{run.path} has lines of completed rounds, and no checkpoint of any",
                fix="Restore the checkpoints folder from a copy, or start the run anew elsewhere.",
            )
        grid.load_states({})
        config = setting.config
        if (trainer := config.training.trainer) is not None:
            told.note(f"clients are trained one by one, by {trainer}, a plain loop of your own")
        elif config.one_by_one:
            told.note("clients are trained one by one: the cohort engine takes plain LoRA only")
        first = first_state(config, setting.shapes, len(setting.data.classes), setting.start)
        return first, Progress()
    for note in checkpoint.notes:
        told.note(note)
    indices = {name: setting.manifest.index_of(name) for name in checkpoints.sites}
    grid.load_states(
        {
            index + 1: RecordDict({codec.KEPT: codec.arrays_from(checkpoints.sites[name])})
            for name, index in indices.items()
        }
    )
    return checkpoint.state, Progress(**checkpoint.extra)


def _with_start(
    federation: Federation, state: ServerState, progress: Progress, *, before: bool
) -> Iterator[Completed]:
    """The rounds to come, the first of a run with the scores that it started from, if these are wanted."""
    start: Scores | None = None
    watch = Stopwatch()
    if before and state.round == 0:
        with watch.phase("evaluate"):
            start = evaluation.before(federation, state)
    for completed in _until_patience(federation, state, progress):
        if start is not None:
            completed.record["start"], start = start, None
            seconds = completed.record["seconds"]
            seconds["evaluate"] = seconds.get("evaluate", 0.0) + watch.seconds["evaluate"]
        yield completed


def _until_patience(
    federation: Federation, state: ServerState, progress: Progress
) -> Iterator[Completed]:
    """The rounds to come, ending early when evaluations stop improving."""
    patience = federation.settings.patience
    if patience is not None and progress.stale >= patience:
        return
    steps = rounds if federation.strategy.buffer_size is None else updates
    for completed in steps(federation, state):
        yield completed
        progress = progress.after(completed, federation.kind)
        if patience is not None and progress.stale >= patience:
            return


def _commit(
    setting: Setting,
    run: RunDir,
    directory: RunDirectory,
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
    completed.record["seconds"]["commit"] = time.monotonic() - start
    directory.round(completed.record, completed.replies)
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


def _summary(
    config: RunConfig,
    state: ServerState,
    progress: Progress,
    account: PrivacyAccount | None,
    verified: Verified | None,
) -> Summary:
    summary: Summary = {
        "status": "finished" if state.round == config.rounds.count else "stopped early",
        "rounds": state.round,
        "final": progress.final,
        "best": progress.best,
        "bytes": {"up": progress.up, "down": progress.down},
        "seconds": progress.seconds,
        "adapter_sha256": adapter_digest(state.adapter, state.delta),
        "history_sha256": progress.history,
        "verified": verified,
    }
    if account is not None:
        summary["privacy"] = account.guarantee()
    return summary
