"""One run with real clients: listen, let sites join, go through the rounds, let the sites go.

The same directory, checkpoints and rounds as a simulation. A server that is started again on its
run directory goes on after the last committed round, on the same port and with the same identity,
so that its clients find it by themselves.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from flwr.app import Message

from fedft.core import models
from fedft.core.errors import (
    ConfigError,
    EnvironmentFailure,
    FedftError,
    Interrupted,
    QuorumFailure,
)
from fedft.core.link.framing import Expected, data_schema
from fedft.core.link.shapes import of_adapter, of_comparison, of_records
from fedft.core.plugins import short_name
from fedft.core.record.rundir import RunDir
from fedft.core.spec import PartitionSpec, TaskSpec
from fedft.core.types import Site
from fedft.core.wire import codec
from fedft.core.wire.schema import ARRAYS
from fedft.server.checkpoints import Checkpoints
from fedft.server.config import RunConfig, check_real
from fedft.server.config_file import configured, differences, parse_toml
from fedft.server.deadline import Pace, pace_of
from fedft.server.elsewhere import AuthorityElsewhere, issuer_of
from fedft.server.enrolment import EnrolledRoster
from fedft.server.grids.grpc import GrpcGrid
from fedft.server.grids.inline import InlineGrid
from fedft.server.grids.stream import Terms, Timing
from fedft.server.identity import (
    Address,
    Audit,
    Registry,
    folder_of,
    load_address,
    make_private_folder,
    save_address,
)
from fedft.server.pruning import site_footprint
from fedft.server.resolve import resolved
from fedft.server.run import complete, leaving_nothing, telling
from fedft.server.setting import CLIENT_APP, Setting, federate, prepare_run, tried
from fedft.server.status import Board, looker, showing
from fedft.trackers import Tracker

_LOOK_UP_S = 0.2

OWN_DATA = "own"
"""What stands for the data in the task that sites are told: they have their own."""


@dataclass(frozen=True)
class Hosting:
    """How a server treats its clients. Changes when a run ends, not what comes of it.

    Attributes:
        first: sites to wait for before the first round, as long as ``patience_s``; None waits for
            ``[rounds] per-round`` as every other round does.
        patience_s: seconds to wait for enough sites before the run pauses.
        linger_s: seconds to wait, when the run is over, for sites that were away, so that they hear
            it; by default twice the longest pause between two attempts of a client.
        grace_s: see :class:`~fedft.server.enrolment.EnrolledRoster`.
        timing: of the streams.
        status: address and port of the status page, see :mod:`fedft.server.status`; None has none.
    """

    first: int | None = None
    patience_s: float = 600.0
    linger_s: float = 60.0
    grace_s: float = 30.0
    timing: Timing = field(default_factory=Timing)
    status: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        if self.first is not None and self.first < 1:
            raise ConfigError(
                f"--wait-for {self.first} is no number of clients", fix="Give 1 or more."
            )
        for name, seconds in (("patience", self.patience_s), ("linger", self.linger_s)):
            if not seconds >= 0:  # nan is none either
                raise ConfigError(
                    f"--{name} {seconds} is no time in seconds", fix="Give 0 or more."
                )


def serve(
    config: RunConfig,
    run_dir: Path | None,
    address: Address,
    *,
    ca: Path | None = None,
    hosting: Hosting | None = None,
    trackers: Sequence[Tracker] = (),
    stop: Callable[[], bool] = lambda: False,
) -> RunDir:
    """Run a federation of real clients, from the beginning or from where it was left.

    Args:
        config: validated. ``[data]`` is the server's own: its test set scores the global model,
            its classes are the run's. ``[fleet]`` and ``[data] partition`` are not looked at.
        run_dir: of the run; None makes ``runs/<time>-<strategy>``.
        address: where to listen. With port 0 a run that goes on takes its old port.
        ca: certificate of an authority that is elsewhere, see :mod:`fedft.server.elsewhere`; None goes on
            with the authority that the run has, or makes one here.
        hosting: patience.
        trackers: are told of the run and its clients, beside those of ``[track]``; none can end it.
        stop: is asked several times a second whether to stop.

    Returns:
        The finished run.

    Raises:
        FedftError: see :mod:`fedft.core.errors`. Committed rounds are never lost.
    """
    config = for_sites(config)
    hosting = hosting or Hosting()
    with (
        _resumable(),
        _claimed(config, run_dir) as run,
        telling(trackers, None if run.finished else config) as told,
    ):
        board = Board(told)
        _settle(run, address, ca, board)
        if run.finished:
            board.note("this run is finished; nothing to serve")
            _dismiss_late(run, address, hosting, board, stop)
            return run
        torch.set_num_threads(config.engine.threads)
        setting = replace(prepare_run(_undivided(config), run), config=config)
        with InlineGrid(CLIENT_APP, 1) as here:
            setting = tried(setting, run, here, board, stop)
        with _listening(_terms(setting, run), run, address, hosting, board) as grid:
            _rounds(setting, run, grid, hosting, board, stop)
            _dismiss(grid, run, hosting, board, stop)
    return run


@contextmanager
def _resumable() -> Iterator[None]:
    """Errors after which the run can go on say how."""
    try:
        yield
    except (EnvironmentFailure, Interrupted, QuorumFailure) as pause:
        how = "Go on with the same command; clients come back by themselves."
        pause.fix = f"{pause.fix} {how}" if pause.fix else how
        raise


def for_sites(config: RunConfig) -> RunConfig:
    """The configuration as sites run it: each trains alone, in the plain loop.

    Raises:
        ConfigError: it asks for what only a simulation does.
    """
    check_real(config)
    return configured(resolved(config), {"engine.cohort": 1})


def _undivided(config: RunConfig) -> RunConfig:
    """Nothing of the server's own data is handed out, so that nothing of it needs dividing."""
    data = config.data.model_copy(update={"partition": PartitionSpec(kind="iid")})
    fleet = config.fleet.model_copy(update={"clients": 1})
    return config.model_copy(update={"data": data, "fleet": fleet})


@contextmanager
def _claimed(config: RunConfig, run_dir: Path | None) -> Iterator[RunDir]:
    """The run's directory, new or from before.

    Raises:
        ConfigError: it belongs to a run with another configuration; the message lists the keys.
    """
    if run_dir is not None and (run_dir / "config.toml").exists():
        with RunDir.open(run_dir, writing=True) as run:
            _check_same(parse_toml(run.config, str(run.path / "config.toml")), config)
            yield run
        return
    with RunDir.create(run_dir, hint=short_name(config.strategy.name)) as run, leaving_nothing(run):
        run.write_config(config.to_toml())
        yield run


def _check_same(old: RunConfig, new: RunConfig) -> None:
    if lines := differences(old.model_copy(update={"track": new.track}), new):
        raise ConfigError(
            "the configuration is not the one this run was started with:\n  " + "\n  ".join(lines),
            fix="Start again without changes, or name another --run-dir for a new run.",
        )


def _with_port(address: Address, run: RunDir) -> Address:
    if address.port:
        return address
    try:
        return replace(address, port=load_address(folder_of(run.path)).port)
    except ConfigError:
        return address


def _settle(run: RunDir, address: Address, ca: Path | None, told: Tracker) -> None:
    """Find out who certifies this server before anything is loaded.

    Raises:
        EnvironmentFailure: the authority is elsewhere, and has not signed the server's request yet.
        ConfigError: the authority is another than the run's.
    """
    if address.insecure:
        if ca is not None:
            raise ConfigError(
                "--ca names an authority, and --insecure does without", fix="Leave one away."
            )
        return
    authority = issuer_of(folder_of(run.path), ca)
    if isinstance(authority, AuthorityElsewhere) and (word := authority.word(address)):
        told.note(word)


def _how_to_invite(folder: Path) -> str:
    return "--certificate NAME.pem" if AuthorityElsewhere.rules(folder) else "-o NAME.kit"


@contextmanager
def _listening(
    terms: Terms, run: RunDir, address: Address, hosting: Hosting, board: Board
) -> Iterator[GrpcGrid]:
    folder, address = folder_of(run.path), _with_port(address, run)
    make_private_folder(folder)  # without TLS no authority is made in it
    authority = None if address.insecure else issuer_of(folder, None)
    registry, audit = Registry(folder), Audit(run.path)
    tell, timing = board.note, hosting.timing
    with GrpcGrid(terms, address, registry, authority, audit, timing, tell) as grid:
        board.doing = lambda name: grid.doing.get(name, "")
        address = replace(address, port=grid.port)
        save_address(folder, address)
        board.note(
            f"listening on {address.binding}, for clients {address.target}"
            f"{' WITHOUT TLS' if address.insecure else ''}; invite them with: "
            f"fedft invite NAME --run-dir {run.path} {_how_to_invite(folder)}"
        )
        with _showing_status(run, grid, hosting, board):
            yield grid


@contextmanager
def _showing_status(run: RunDir, grid: GrpcGrid, hosting: Hosting, board: Board) -> Iterator[None]:
    if hosting.status is None:
        yield
        return
    registry = Registry(folder_of(run.path))
    look = looker(run, board, registry.clients, grid)
    with showing(*hosting.status, look) as url:
        board.note(f"status page at {url}, metrics at {url}metrics")
        yield


def _rounds(
    setting: Setting,
    run: RunDir,
    grid: GrpcGrid,
    hosting: Hosting,
    board: Board,
    stop: Callable[[], bool],
) -> None:
    rounds = setting.config.rounds
    pace = pace_of(
        setting.config, setting.shapes, models.geometry(setting.config.model, setting.folder)
    )
    roster = EnrolledRoster(
        Registry(folder_of(run.path)),
        grid,
        quorum=rounds.needed,
        first=hosting.first,
        patience_s=hosting.patience_s,
        gather_s=rounds.gather_s,
        grace_s=hosting.grace_s,
        watch=board.waiting,
        stop=stop,
    )
    board.note(_deadline(rounds.deadline_s, pace))
    with InlineGrid(CLIENT_APP, rounds.per_round) as evaluator:
        federation = replace(
            federate(setting, grid, stop),
            roster=roster,
            evaluator=evaluator,
            real=True,
            pace=pace,
            watch=board.waiting,
            scoring=board.waiting,
        )
        try:
            complete(setting, run, grid, federation, board)
        except FedftError as error:
            grid.drain(finished=False, reason=error.what)
            raise


def _deadline(given_s: float | None, pace: Pace) -> str:
    """When rounds close, for whoever watches."""
    if given_s is not None:
        return f"a round closes after {given_s:g} s ([rounds] deadline-s)"
    return f"a round closes after {pace.sentence()}; [rounds] deadline-s sets another time"


def _dismiss(
    grid: GrpcGrid, run: RunDir, hosting: Hosting, board: Board, stop: Callable[[], bool]
) -> None:
    """Tell every site that the run is over, and wait a while for those that are away."""
    summary = run.summary()
    assert summary is not None  # the run is over
    grid.drain(finished=True, reason=f"the run is over, after {summary['rounds']} rounds")
    registry, ends = Registry(folder_of(run.path)), time.monotonic() + hosting.linger_s
    if away := registry.unaware():
        board.note(
            f"waiting up to {hosting.linger_s:.0f} s to tell {', '.join(away)} that the run is over"
        )
    while registry.unaware() and time.monotonic() < ends and not stop():
        time.sleep(_LOOK_UP_S)


def _dismiss_late(
    run: RunDir, address: Address, hosting: Hosting, board: Board, stop: Callable[[], bool]
) -> None:
    """The same for a server that ended, or died, before everybody had heard it."""
    if Registry(folder_of(run.path)).unaware():
        nothing = Terms(run.path.name, "", {}, expected=lambda message: {})
        with _listening(nothing, run, address, hosting, board) as grid:
            _dismiss(grid, run, hosting, board, stop)


def _terms(setting: Setting, run: RunDir) -> Terms:
    task = sites_task(setting)
    hashes = models.fingerprint(setting.folder)
    return Terms(
        run=run.path.name,
        task=task.model_dump_json(),
        hashes={**hashes, "data_schema": data_schema(task, task.classes)},
        expected=_expectations(setting),
        compressor=setting.config.engine.compressor,
        objection=lambda site: objection(setting, site),
        history=_history(setting, run),
    )


def sites_task(setting: Setting) -> TaskSpec:
    """The task as sites are told it: without the server's own data and folders."""
    data = setting.task.data.model_copy(update={"source": OWN_DATA, "test_source": None})
    return setting.task.model_copy(
        update={
            "data": data,
            "classes": setting.data.classes,
            "manifest": None,
            "fingerprint": "",
            "device": "cpu",
            "quorum": setting.config.rounds.needed,
        }
    )


def objection(setting: Setting, site: Site) -> str | None:
    """Why a site cannot take part in this run, for its rank or its memory; None if it can."""
    config = setting.config
    rank = site.rank if site.rank is not None else config.rank
    if rank > config.rank:
        return f"{site.name} wants rank {rank}, and the run's largest is {config.rank}"
    if rank != config.rank and not config.strategy.mixed_ranks:
        return f"{site.name} wants rank {rank}, and {config.strategy.name} needs {config.rank} of all clients"
    if rank != config.rank and (why := _against_ranks(config, rank)) is not None:
        return f"{site.name} wants rank {rank}, and the run's is {config.rank}: {why}"
    if site.memory_mib is not None and config.training.dp is not None:
        return (
            f"{site.name} grants {site.memory_mib:.0f} MiB, and clients with a memory budget train in "
            "the cohort engine, which has no DP-SGD; join without --memory"
        )
    if site.memory_mib is not None and config.training.trainer is not None:
        return (
            f"{site.name} grants {site.memory_mib:.0f} MiB, and what the trainer {config.training.trainer} "
            "takes is not known; join without --memory"
        )
    if site.memory_mib is None:
        return None
    if (needed := _needed_mib(setting, rank)) is None:
        return (
            f"{site.name} grants {site.memory_mib:.0f} MiB, and what this architecture takes is not "
            "known; join without --memory"
        )
    if site.memory_mib < needed:
        return (
            f"training takes {needed:.0f} MiB at rank {rank}, and {site.name} grants "
            f"{site.memory_mib:.0f} MiB"
        )
    return None


def _against_ranks(config: RunConfig, rank: int) -> str | None:
    """What the configuration has against a second rank, by the rules for a fleet that has two."""
    fleet = {"clients": config.fleet.clients, "ranks": sorted({rank, config.rank})}
    try:
        configured(config, {"fleet": fleet})
    except ConfigError as error:
        return error.what.splitlines()[-1].strip()
    return None


def _needed_mib(setting: Setting, rank: int) -> float | None:
    """With as few blocks as the run's pruning allows: all of them where it prunes nothing.

    None where the architecture's memory is not known.
    """
    config = setting.config
    if (geometry := models.geometry(config.model, setting.folder)) is None:
        return None
    found = site_footprint(config, setting.shapes, geometry, rank, limited=True)
    return found.mib(1 if config.pruning.selection != "none" else None)


def _expectations(setting: Setting) -> Callable[[Message], Expected]:
    """What a reply may hold: the parts and records that its plan asks for, at the plan's rank."""
    known: dict[str, Expected] = {}

    def expected(message: Message) -> Expected:
        fields = codec.message_fields(message.content)
        if fields.get("probe") is not None:
            return {ARRAYS: of_comparison(setting.shapes, fields["granularity"])}
        if "send" not in fields:
            return {}
        asked = ("rank", "send", "train", "terms")
        key = json.dumps([fields.get(name) for name in asked])
        if key not in known:
            arrays = of_adapter(setting.shapes, int(fields["rank"]), fields["send"])
            known[key] = {ARRAYS: arrays, **of_records(setting.shapes, fields, "sends")}
        return known[key]

    return expected


def _history(setting: Setting, run: RunDir) -> Mapping[str, int]:
    """Site → the last committed round that counts a result of it."""
    keep = setting.config.rounds.keep_checkpoints
    checkpoint = Checkpoints(run.checkpoints, keep=keep).load()
    last = 0 if checkpoint is None else checkpoint.state.round
    return {
        str(line["site"]): int(line["round"])
        for line in run.clients()
        if line["kind"] == "train" and line.get("status") == "ok" and line["round"] <= last
    }
