"""The simulated clock: device time by hand, deadlines, spares, availability, and their errors."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedft.api import Run
from fedft.core.data import partition
from fedft.core.errors import ConfigError, Interrupted, MismatchError
from fedft.core.spec import PartitionSpec
from fedft.core.types import Adapter, Factors, LocalTraining, TrainPlan
from fedft.core.wire import codec
from fedft.core.wire.changes import Packing
from fedft.core.wire.compress import compressor_of, names
from fedft.server.availability import read_availability
from fedft.server.clock import SimulatedClock, examples
from fedft.server.config_file import parse_config, parse_toml
from fedft.server.fleet import Device, Distribution, Fleet, read_devices
from fedft.server.run import resume, simulate
from fedft.server.sampling import SimulatedRoster

Table = Callable[..., dict[str, Any]]


def run_of(table: dict[str, Any], folder: Path, **options: Any) -> Run:
    return Run(simulate(parse_config(table), folder, **options).path)


def replies(run: Run) -> list[dict[str, Any]]:
    lines = (run.directory / "clients.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def clock(count: int = 4, fleet: Fleet | None = None, **options: Any) -> SimulatedClock:
    spec = PartitionSpec(kind="iid")
    manifest = partition.build(spec, examples=20 * count, clients=count, seed=0)
    return SimulatedClock(SimulatedRoster(manifest, fleet=fleet or Fleet()), seed=0, **options)


def plan(**training: Any) -> TrainPlan:
    adapter = Adapter({"q": Factors(torch.ones(2, 500), torch.zeros(750, 2), 1.0)})
    return TrainPlan(adapter, training=LocalTraining(**training), send=frozenset({"B"}))


# ── device time ───────────────────────────────────────────────────────────────────────────────


def test_device_time_by_hand() -> None:
    # Down: 2 (500 + 750) numbers of 4 bytes are 0.08 megabits; up: 2 x 750, 0.048 megabits.
    device = Device(samples_per_s=5.0, up_mbps=0.1, down_mbps=0.4)
    one = clock(fleet=Fleet(devices=(device,)))
    trip = one.trip(one.roster.site(0), plan(steps=3, batch_size=8))
    assert trip.download == pytest.approx(0.08 / 0.4)
    assert trip.compute == pytest.approx(20 / 5)  # three batches of 8 are one pass over 20
    assert trip.upload == pytest.approx(0.048 / 0.1)


@pytest.mark.parametrize(
    ("training", "held", "expected"),
    [
        ({"epochs": 3, "batch_size": 8}, 20, 60),
        ({"steps": 2, "batch_size": 8}, 20, 16),
        ({"steps": 7, "batch_size": 8}, 20, 2 * 20 + 8),
        ({"steps": 5, "batch_size": 8}, 3, 15),
        ({"steps": 5, "batch_size": 8}, 0, 0),
    ],
)
def test_examples_that_a_site_goes_through(
    training: dict[str, int], held: int, expected: int
) -> None:
    assert examples(LocalTraining(**training), held) == expected


@pytest.mark.parametrize("wire", names())
def test_bytes_from_shapes_are_those_of_the_messages(wire: str) -> None:
    delta = {"q": Factors(torch.ones(3, 500), torch.ones(750, 3), 1.0)}
    full = TrainPlan(plan().start, delta=delta, receive=frozenset({"B"}), send=frozenset({"A"}))
    compressor = compressor_of(wire)
    down, up = codec.plan_bytes(full, compressor)
    assert down == codec.content_bytes(codec.Encoder("task", compressor).train(full))
    assert up == codec.payload_bytes(
        Packing(compressor, start=full.start.tensors()).pack(full.sent())[0]
    )


# ── the fleet ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["uniform", "log-uniform", "log-normal"])
def test_draws_lie_within_the_bounds_and_belong_to_the_site(kind: Any) -> None:
    drawn = Distribution(kind=kind, low=2, high=20)
    values = [drawn.draw(0, "speed", f"site-{k}") for k in range(400)]
    assert min(values) >= 2
    assert max(values) <= 20
    median = sorted(values)[200]
    assert median == pytest.approx(11 if kind == "uniform" else 40**0.5, rel=0.15)
    assert values[7] == drawn.draw(0, "speed", "site-7") != drawn.draw(1, "speed", "site-7")


def test_classes_of_devices_are_dealt_by_share() -> None:
    fleet = Fleet(devices=(Device(name="phone", share=3.0), Device(name="laptop")))
    names = [fleet.device(f"site-{k}").name for k in range(1000)]
    assert names.count("phone") == pytest.approx(750, abs=50)


def test_ranks_are_drawn_as_whole_numbers_up_to_the_global_one() -> None:
    ranks = {"kind": "uniform", "low": 4, "high": 6}
    config = parse_config({"fleet": {"ranks": ranks}, "strategy": {"name": "flexlora"}})
    drawn = {config.devices.device(f"site-{k}").rank for k in range(50)}
    assert drawn == set(config.fleet.rank_choices) == {4, 5, 6}
    assert config.rank == 6
    with pytest.raises(ConfigError, match="fedavg-lora cannot take clients of different ranks"):
        parse_config({"fleet": {"ranks": ranks}})


def test_a_file_of_devices_becomes_part_of_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "devices.csv"
    path.write_text(
        "# two classes\nname,share,rank,memory_mib,samples_per_s\nphone,3,4,2048,1.5\nlaptop,1,8,,12\n"
    )
    table = {"fleet": {"devices": str(path)}, "strategy": {"name": "flexlora"}}
    config = parse_config(table)
    path.unlink()
    assert parse_toml(config.to_toml(), "again") == config
    assert config.rank == 8
    assert config.fleet.devices[0] == Device(
        name="phone", share=3, rank=4, memory_mib=2048, samples_per_s=1.5
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "name,sampels_per_s\na,1\n",
            "unknown column 'sampels_per_s'; did you mean 'samples_per_s'",
        ),
        ("name,samples_per_s\na,-2\n", "line 2: samples_per_s = '-2': .*greater than 0"),
        ("name,samples_per_s\na,fast\n", "line 2: samples_per_s = 'fast'"),
        ("name,samples_per_s\n\n# nothing\n", "has no rows"),
        ("name,samples_per_s\na\n", "line 2: 1 cells under 2 columns"),
        ("name,name\na,b\n", "exactly one column 'name'"),
    ],
)
def test_a_file_of_devices_that_cannot_be_used(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "devices.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why):
        read_devices(path)


@pytest.mark.parametrize(
    ("fleet", "why"),
    [
        ({"devices": "nowhere.csv"}, "cannot read nowhere.csv"),
        ({"devices": [{"site": "a"}, {"rank": 4}]}, "1 of 2 devices have no site"),
        ({"devices": [{"rank": 4}, {}]}, "1 of 2 devices have no rank"),
        ({"devices": [{"site": "a"}, {"site": "a"}]}, "client 'a' has two devices"),
        ({"devices": [{"name": "a"}], "speeds": [1]}, "speeds cannot stand beside them"),
        ({"speeds": [0]}, "greater than 0"),
        ({"speeds": {"kind": "uniform", "low": 3, "high": 2}}, "low = 3.0 is above high"),
        ({"period-s": 10}, "and there is none"),
    ],
)
def test_a_fleet_that_cannot_be(fleet: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_config({"fleet": fleet})


def test_devices_by_site_are_those_of_the_registered_sites(tiny_table: Table, tmp_path: Path):
    def fleet(names: Sequence[str]) -> dict[str, Any]:
        return {"devices": [{"site": name, "samples-per-s": 2.0} for name in names]}

    sites = [f"site-{k}" for k in range(8)]
    run_of(tiny_table(fleet=fleet(sites), rounds={"count": 1}), tmp_path / "all")
    with pytest.raises(MismatchError, match="names 'site-9', and no registered"):
        run_of(tiny_table(fleet=fleet([*sites, "site-9"])), tmp_path / "more")
    with pytest.raises(MismatchError, match="leaves out 1 of 8 registered clients, 'site-3'"):
        run_of(tiny_table(fleet=fleet(sites[:3] + sites[4:])), tmp_path / "fewer")


# ── rounds ────────────────────────────────────────────────────────────────────────────────────

UNEVEN = {"speeds": [1.0, 10.0], "up-mbps": [1.0]}


def test_a_round_lasts_as_long_as_its_slowest_site(tiny_table: Table, tmp_path: Path) -> None:
    run = run_of(tiny_table(fleet=UNEVEN, training={"steps": 2}), tmp_path / "run")
    for line in run.rounds:
        mine = [r for r in replies(run) if r["kind"] == "train" and r["round"] == line["round"]]
        assert line["clock"]["seconds"] == pytest.approx(max(r["device_seconds"] for r in mine))
        assert line["clock"]["device_seconds"] == pytest.approx(
            sum(r["device_seconds"] for r in mine)
        )
    total = sum(line["clock"]["seconds"] for line in run.rounds)
    assert run.rounds[-1]["clock"]["elapsed"] == pytest.approx(total)


def test_the_clock_changes_nothing_else(tiny_table: Table, tmp_path: Path) -> None:
    """The same cohorts, batches and adapter as without; positive control of the tests below."""
    timed = run_of(tiny_table(fleet=UNEVEN), tmp_path / "timed")
    plain = run_of(tiny_table(), tmp_path / "plain")
    assert timed.metrics["adapter_sha256"] == plain.metrics["adapter_sha256"]
    assert timed.metrics["bytes"] == plain.metrics["bytes"]


def test_those_who_are_late_are_lost_and_never_trained(tiny_table: Table, tmp_path: Path) -> None:
    table = tiny_table(fleet=UNEVEN, rounds={"deadline-s": 4.0, "quorum": 1}, training={"steps": 2})
    run = run_of(table, tmp_path / "run")
    lines = [line for line in replies(run) if line["kind"] == "train"]
    late = [line for line in lines if line["status"] == "late"]
    assert late
    assert len(late) < len(lines)
    for line in lines:
        if line["status"] == "late":
            assert line["device_seconds"] == 4.0
        else:
            assert line["device_seconds"] <= 4.0
    for line in run.rounds:
        assert line["clock"]["seconds"] <= 4.0 * line["attempts"]
        # What was sent to the late ones was sent.
        assert line["bytes"]["down"] == line["attempts"] * 4 * line["bytes"]["up"] / len(
            [x for x in lines if x["round"] == line["round"] and x["status"] == "ok"]
        )
    again = run_of(table, tmp_path / "again")
    assert again.metrics["history_sha256"] == run.metrics["history_sha256"]


def test_with_spares_the_fastest_count(tiny_table: Table, tmp_path: Path) -> None:
    table = tiny_table(
        fleet=UNEVEN, rounds={"per-round": 3, "spares": 3, "quorum": 3}, training={"steps": 2}
    )
    run = run_of(table, tmp_path / "run")
    for line in run.rounds:
        assert len(line["cohort"]) == 6
        assert len(line["failures"]["spare"]) == 3
        mine = [r for r in replies(run) if r["kind"] == "train" and r["round"] == line["round"]]
        kept = [r["device_seconds"] for r in mine if r["status"] == "ok"]
        assert all(r["device_seconds"] >= max(kept) for r in mine if r["status"] == "spare")
        assert line["clock"]["seconds"] == pytest.approx(max(kept))


def test_a_deadline_that_nobody_can_meet(tiny_table: Table, tmp_path: Path) -> None:
    table = tiny_table(fleet={"speeds": [0.01]}, rounds={"deadline-s": 2.0})
    with pytest.raises(
        ConfigError, match="deadline-s = 2, and the fastest of 12 clients"
    ) as caught:
        run_of(table, tmp_path / "run")
    assert "Raise the deadline above" in caught.value.fix


def test_spares_need_a_clock(tiny_table: Table) -> None:
    with pytest.raises(ConfigError, match="spares need the simulated clock"):
        parse_config(tiny_table(rounds={"spares": 1}))


# ── availability ──────────────────────────────────────────────────────────────────────────────


def trace(folder: Path, text: str, **options: Any) -> Any:
    path = folder / "trace.csv"
    path.write_text(text)
    return read_availability(path, **options)


def test_windows_by_hand(tmp_path: Path) -> None:
    once = trace(tmp_path, "site,start_s,end_s\na,10,20\na,20,30\nb,5,6\n")
    assert [once.until("a", t) for t in (0, 10, 25, 30)] == [None, 30, 30, None]
    assert [once.next_opening(t) for t in (0, 5, 10)] == [5, 10, None]
    assert [once.anybody(t) for t in (0, 5, 6, 10)] == [False, True, False, True]


def test_windows_that_repeat(tmp_path: Path) -> None:
    text = "site,start_s,end_s\nday,8,20\nnight,20,24\nnight,0,8\nalways,0,24\n"
    daily = trace(tmp_path, text, period_s=24.0)
    assert daily.until("day", 24 * 1000 + 8) == 24 * 1000 + 20
    assert daily.until("day", 24 + 7.9) is None
    assert daily.until("night", 24 + 21) == 48 + 8, "a window goes on over midnight"
    assert daily.until("always", 1e6) == float("inf")
    assert daily.next_opening(23) == 24


def test_openings_lead_on_however_long_a_run_lasts(tmp_path: Path) -> None:
    """A window must be open at the time at which it is said to open, in floating point too."""
    daily = trace(tmp_path, "profile,start_s,end_s\np,0.1,0.2\n", period_s=0.7)
    at = 0.0
    for _ in range(3000):
        opening = daily.next_opening(at)
        assert opening > at
        assert daily.anybody(opening)
        at = opening


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("site,start_s,end_s\na,0,10\na,9,12\n", "lines 2 and 3: windows of 'a' overlap at 9 s"),
        ("site,start_s,end_s\na,-1,10\n", "line 2: a window from -1 to 10 s"),
        ("site,start_s,end_s\na,10,10\n", "line 2: a window from 10 to 10 s"),
        ("site,start_s,end_s\na,0,inf\n", "line 2: a window from 0 to inf"),
        ("site,start_s,end_s\na,0,noon\n", "line 2: .*noon"),
        ("site,start_s,end_s\na,90,101\n", "ends at 101 s, after the period of 100 s"),
        ("site,start_s,end_s\n,0,1\n", "line 2: whose window"),
        ("start_s,end_s\n0,1\n", "needs a column 'site' or a column 'profile'"),
        ("site,profile,start_s,end_s\na,b,0,1\n", "and has 2 of them"),
        ("site,start_s,stop_s\na,0,1\n", "unknown column 'stop_s'"),
        ("site,start_s\na,0\n", "exactly one column 'end_s'"),
    ],
)
def test_a_trace_that_cannot_be_used(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        trace(tmp_path, text, period_s=100.0)


def test_only_those_who_can_be_reached_are_asked(tmp_path: Path) -> None:
    text = "site,start_s,end_s\n" + "".join(f"site-{k},{10 * k},1000\n" for k in range(8))
    one = clock(8, availability=trace(tmp_path, text))
    cohort, at = one.cohort(1, 0, count=4, needed=2, now=0.0)
    # site-1 is the second to open, at 10 s: the clock waits for it, and for nobody else.
    assert ([site.name for site in cohort], at) == (["site-0", "site-1"], 10.0)
    cohort, at = one.cohort(1, 0, count=4, needed=2, now=200.0)
    assert (len(cohort), at) == (4, 200.0)
    with pytest.raises(ConfigError, match="can never be reached together"):
        one.cohort(1, 0, count=4, needed=2, now=1000.0)


def test_scarce_sites_are_drawn_evenly(tmp_path: Path) -> None:
    text = "site,start_s,end_s\n" + "".join(f"site-{k},{k % 2},9\n" for k in range(8))
    one = clock(8, availability=trace(tmp_path, text))
    drawn = [s.name for r in range(400) for s in one.cohort(r, 0, count=2, needed=2, now=0.5)[0]]
    assert {name: drawn.count(name) for name in drawn}.keys() == {f"site-{k}" for k in (0, 2, 4, 6)}
    assert all(drawn.count(name) == pytest.approx(200, abs=40) for name in set(drawn))


def test_a_million_registered_sites_cost_nothing(tmp_path: Path) -> None:
    text = "profile,start_s,end_s\n" + "".join(f"zone-{k:02},{k},{k + 8}\n" for k in range(16))
    spec = PartitionSpec(kind="bootstrap", rows_per_client=1)
    manifest = partition.build(spec, examples=100, clients=1_000_000, seed=0)
    fleet = Fleet(samples_per_s=Distribution(kind="log-normal", low=1, high=9))
    looked: list[str] = []

    class Watching(SimulatedRoster):
        def site(self, index: int) -> Any:
            looked.append(self.manifest.name_of(index))
            return super().site(index)

    one = SimulatedClock(Watching(manifest, fleet=fleet), 0, availability=trace(tmp_path, text))
    cohort, _ = one.cohort(1, 0, count=100, needed=100, now=8.0)
    assert len({site.name for site in cohort}) == 100
    assert len(looked) < 1000, "about sixteen times as many as can be reached half of the time"
    assert one.idle(0, {site.name for site in cohort}, 8.0) is not None


def test_a_run_goes_on_at_the_time_it_was_stopped(
    tiny_table: Table, tmp_path: Path, stop_after: Callable[[int], Any]
) -> None:
    text = "profile,start_s,end_s\nday,0,60\nnight,50,100\n"
    (tmp_path / "trace.csv").write_text(text)
    fleet = {**UNEVEN, "availability": str(tmp_path / "trace.csv"), "period-s": 100.0}
    table = tiny_table(fleet=fleet, rounds={"count": 5, "per-round": 3, "quorum": 2})
    whole = run_of(table, tmp_path / "whole")
    stop = stop_after(2)
    with pytest.raises(Interrupted):
        run_of(table, tmp_path / "part", trackers=[stop], stop=stop)
    part = Run(resume(tmp_path / "part").path)
    assert part.metrics["history_sha256"] == whole.metrics["history_sha256"]
    assert [line["clock"] for line in part.rounds] == [line["clock"] for line in whole.rounds]
    (tmp_path / "trace.csv").write_text(text.replace("60", "61"))
    stop = stop_after(2)
    with pytest.raises(Interrupted):
        run_of(table, tmp_path / "changed", trackers=[stop], stop=stop)
    (tmp_path / "trace.csv").write_text(text)
    with pytest.raises(MismatchError, match="availability is not that of this run"):
        resume(tmp_path / "changed")
