"""The privacy account: the figures of the accountants themselves, and never an attempt too few."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant, RDPAccountant

from fedft.api import Run
from fedft.core.errors import ConfigError, IntegrityError, SecurityRefusal
from fedft.core.privacy import entropy
from fedft.core.record.rundir import RunDir
from fedft.server import privacy
from fedft.server.checkpoints import Checkpoints
from fedft.server.config import check_real
from fedft.server.config_file import parse_config
from fedft.server.forecast import as_text, forecast
from fedft.server.grids.inline import Fault, Faults, InlineGrid
from fedft.server.resolve import resolved
from fedft.server.run import fork, resume, simulate
from fedft.strategies import CentralDP
from tests.forks import Forks

Table = Callable[..., dict[str, Any]]
REFERENCE = (1.0, 0.1, 100)  # noise multiplier, sampling rate, releases
DELTA = 1e-5


def poisson(z: float, q: float, n: int) -> dp_accounting.DpEvent:
    once = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z))
    return dp_accounting.SelfComposedDpEvent(once, n)


# ── the figures ───────────────────────────────────────────────────────────────────────────────


def test_epsilon_of_sites_is_dp_accountings_figure_and_agrees_with_opacus() -> None:
    accountant = PLDAccountant()
    accountant.compose(poisson(*REFERENCE))
    mine = privacy.site_epsilon([REFERENCE], DELTA)
    assert mine == pytest.approx(accountant.get_epsilon(DELTA), abs=1e-3)
    assert mine >= accountant.get_epsilon(DELTA), "coarser steps round up"
    other = PRVAccountant()  # the same losses, composed by another method, to its stated error
    other.history = [REFERENCE]
    assert mine == pytest.approx(other.get_epsilon(DELTA, eps_error=0.01), abs=0.02)
    assert mine == pytest.approx(7.047, abs=1e-3)


def test_epsilon_of_examples_is_opacus_figure_and_agrees_with_dp_accounting() -> None:
    accountant = RDPAccountant()
    for _ in range(REFERENCE[2]):
        accountant.step(noise_multiplier=REFERENCE[0], sample_rate=REFERENCE[1])
    mine = privacy.example_epsilon([REFERENCE], DELTA)
    assert mine == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-12)
    other = RdpAccountant(range(2, 64))  # where both know the moments in closed form
    other.compose(poisson(*REFERENCE))
    assert mine == pytest.approx(other.get_epsilon(DELTA), rel=0.01)
    assert mine == pytest.approx(7.899, abs=1e-3)
    assert mine > privacy.site_epsilon([REFERENCE], DELTA), "Rényi accounting is the looser one"


def test_nothing_released_is_nothing_spent() -> None:
    assert privacy.site_epsilon([], DELTA) == privacy.example_epsilon([], DELTA) == 0.0


def test_a_target_is_met_from_below() -> None:
    z = privacy.solved_noise(4.0, 0.2, 10, DELTA)
    spent = privacy.site_epsilon([(z, 0.2, 10)], DELTA)
    assert 3.97 < spent <= 4.0
    with pytest.raises(ConfigError, match="no noise multiplier"):
        privacy.solved_noise(1e-9, 0.2, 10, DELTA)


# ── noise and sampling ────────────────────────────────────────────────────────────────────────


def test_noise_is_normal_and_never_the_same() -> None:
    x = entropy.gaussian(200_001)
    assert x.shape == (200_001,)
    assert abs(float(x.mean())) < 0.012
    assert float(x.std()) == pytest.approx(1, abs=0.01)
    assert float((x.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.006)
    torch.manual_seed(0)
    first = entropy.gaussian(8)
    torch.manual_seed(0)
    assert not torch.equal(first, entropy.gaussian(8))


def test_each_site_is_drawn_with_its_own_probability(tiny_table: Table, tmp_path: Path) -> None:
    run = simulate(parse_config(tiny_table(rounds={"count": 1})), tmp_path / "run")
    from fedft.core.data import partition
    from fedft.server.sampling import SimulatedRoster

    roster = SimulatedRoster(partition.load(run.partition))
    generator = entropy.Keystream()
    cohorts = [[s.name for s in roster.poisson(0.25, generator)] for _ in range(4000)]
    sizes = torch.tensor([len(c) for c in cohorts], dtype=torch.float64)
    assert float(sizes.mean()) == pytest.approx(2, abs=0.15)
    assert float(sizes.var()) == pytest.approx(8 * 0.25 * 0.75, abs=0.2), (
        "independent, not a fixed number"
    )
    assert {0, 1, 5} <= {len(c) for c in cohorts}
    for name in {name for c in cohorts for name in c}:
        assert sum(name in c for c in cohorts) / 4000 == pytest.approx(0.25, abs=0.04)
    assert all(c == sorted(set(c)) for c in cohorts)


# ── runs ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def private(tiny_table: Table) -> Table:
    def table(strategy: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        rule = {"name": "central-dp", "noise-multiplier": 0.8, "clip": 0.5, **(strategy or {})}
        rounds = {"count": 3, "per-round": 2, "evaluate-every": 1, **changes.pop("rounds", {})}
        return tiny_table(strategy=rule, rounds=rounds, training={"steps": 1}, **changes)

    return table


def ledger(folder: Path) -> list[dict[str, Any]]:
    return RunDir.open(folder).releases()


def spent(folder: Path, z: float = 0.8, q: float = 0.25) -> float:
    return privacy.site_epsilon([(z, q, len(ledger(folder)))], DELTA)


def test_a_private_run_says_what_it_spent(private: Table, tmp_path: Path) -> None:
    table = private({"quantile": 0.5, "count-noise": 1.0})
    run = Run(simulate(parse_config(table), tmp_path / "run").path)
    assert [line["round"] for line in ledger(run.directory)] == [1, 2, 3]
    assert all(line["site"] == [0.8, 0.25] for line in ledger(run.directory))
    guarantees = [line["privacy"]["site"] for line in run.rounds]
    assert [g["releases"] for g in guarantees] == [1, 2, 3]
    assert guarantees[-1]["epsilon"] == spent(run.directory)
    assert guarantees[0]["epsilon"] < guarantees[1]["epsilon"] < guarantees[2]["epsilon"]
    assert guarantees[-1]["sampling"] == "poisson"
    assert guarantees[-1]["adjacency"] == "add or remove one client"
    assert run.metrics["privacy"] == run.rounds[-1]["privacy"]
    state = Checkpoints(run.directory / "checkpoints").load()
    assert state is not None
    assert "central-dp/clip" in state.state.slots, "the bound crosses the round boundary"


def test_the_same_seed_draws_other_noise(private: Table, tmp_path: Path) -> None:
    config = parse_config(private(rounds={"per-round": 8}))
    hashes = {
        Run(simulate(config, tmp_path / name).path).metrics["adapter_sha256"] for name in "ab"
    }
    assert len(hashes) == 2


def test_rounds_without_any_site_are_rounds(
    private: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedft.server.sampling.SimulatedRoster.poisson", lambda *_: [])
    run = Run(simulate(parse_config(private()), tmp_path / "run").path)
    assert [line["cohort"] for line in run.rounds] == [[], [], []]
    assert len(ledger(run.directory)) == 3


class Killed(BaseException):
    """What a test puts in place of a power cut."""


STEPS: dict[str, tuple[type, str, bool]] = {
    "before the ledger": (RunDir, "append_release", False),
    "after the ledger": (RunDir, "append_release", True),
    "before the noise": (CentralDP, "release", False),
    "after the noise": (CentralDP, "release", True),
    "before the lines": (RunDir, "append_round", False),
    "before the commit": (Checkpoints, "commit", False),
    "after the commit": (Checkpoints, "commit", True),
}


def struck(monkeypatch: pytest.MonkeyPatch, step: str, strike: Callable[[], None]) -> None:
    """Strike at one step of the second round."""
    owner, name, after = STEPS[step]
    real, calls = getattr(owner, name), []

    def wrapped(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == 2 and not after:
            strike()
        result = real(*args, **options)
        if len(calls) == 2 and after:
            strike()
        return result

    monkeypatch.setattr(owner, name, wrapped)


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("step", STEPS)
def test_no_kill_makes_the_account_too_low(
    step: str, private: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 66: every noise that was ever drawn has a line of its own."""
    drawn: list[int] = []
    release = CentralDP.release

    def counted(self: CentralDP, state: Any, *rest: Any) -> Any:
        drawn.append(state.round)
        return release(self, state, *rest)

    monkeypatch.setattr(CentralDP, "release", counted)
    with monkeypatch.context() as patch:
        struck(patch, step, kill)
        with pytest.raises(Killed):
            simulate(parse_config(private()), tmp_path / "run")
    run = Run(resume(tmp_path / "run").path)
    lines = [line["round"] for line in ledger(run.directory)]
    assert run.metrics["rounds"] == 3
    for round_ in (1, 2, 3):
        assert lines.count(round_) >= drawn.count(round_)
    assert len(lines) <= 4, "one attempt was struck"
    assert run.rounds[-1]["privacy"]["site"]["epsilon"] == spent(run.directory)
    repeated = step not in ("before the ledger", "after the commit")
    assert lines == ([1, 2, 2, 3] if repeated else [1, 2, 3])


def simulated_until(step: str | None, table: dict[str, Any], folder: Path) -> None:
    """A run in a process that dies at one step."""
    with pytest.MonkeyPatch.context() as patch:
        if step is not None:
            struck(patch, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
        simulate(parse_config(table), folder)


@pytest.mark.crash
@pytest.mark.parametrize("step", STEPS)
def test_no_sigkill_makes_the_account_too_low(
    step: str, private: Table, tmp_path: Path, forks: Forks
) -> None:
    """The same, by a process that dies without a chance to clean up."""
    forks.warmed(simulated_until, None, private(), tmp_path / "first")
    end = os.waitstatus_to_exitcode(forks.run(simulated_until, step, private(), tmp_path / "run"))
    assert end == -signal.SIGKILL
    assert Run(tmp_path / "run").rounds[0]["round"] == 1, "struck in the second round"
    run = Run(resume(tmp_path / "run").path)
    repeated = step not in ("before the ledger", "after the commit")
    assert [line["round"] for line in ledger(run.directory)] == (
        [1, 2, 2, 3] if repeated else [1, 2, 3]
    )
    assert run.rounds[-1]["privacy"]["site"]["epsilon"] == spent(run.directory)


def test_half_a_line_was_never_acted_on(
    private: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck(monkeypatch, "before the ledger", kill)
    with pytest.raises(Killed):
        simulate(parse_config(private()), tmp_path / "run")
    file = tmp_path / "run" / "privacy.jsonl"
    file.write_bytes(file.read_bytes() + b'{"round": 2, "si')
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert [line["round"] for line in ledger(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("damage", ["gone", "a line less", "a damaged line"])
def test_a_ledger_that_does_not_cover_the_run_stops_it(
    damage: str, private: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck(monkeypatch, "after the commit", kill)
    with pytest.raises(Killed):
        simulate(parse_config(private()), tmp_path / "run")
    monkeypatch.undo()
    file = tmp_path / "run" / "privacy.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    if damage == "gone":
        file.unlink()
    elif damage == "a line less":
        file.write_bytes(lines[0])
    else:
        file.write_bytes(b"{}\n" + lines[1])
    with pytest.raises(IntegrityError):
        resume(tmp_path / "run")


def test_a_run_stops_before_it_spends_more_than_its_target(
    private: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 65: a struck attempt counts, so that the last round no longer fits."""
    config = resolved(parse_config(private({"target-epsilon": 6.0})))
    assert isinstance(config.strategy, CentralDP)
    assert config.strategy.expected_sites == 2
    z = config.strategy.noise_multiplier
    assert privacy.site_epsilon([(z, 0.25, 3)], DELTA) <= 6.0
    assert privacy.site_epsilon([(z, 0.25, 4)], DELTA) > 6.0
    with monkeypatch.context() as patch:
        struck(patch, "before the commit", kill)
        with pytest.raises(Killed):
            simulate(config, tmp_path / "run")
    with pytest.raises(SecurityRefusal, match="round 3 would spend"):
        resume(tmp_path / "run")
    assert [line["round"] for line in ledger(tmp_path / "run")] == [1, 2, 2]
    assert Run(tmp_path / "run").rounds[-1]["round"] == 2


def test_a_fork_carries_the_account_and_cannot_drop_the_promise(
    private: Table, tiny_table: Table, tmp_path: Path
) -> None:
    config = parse_config(private())
    simulate(config, tmp_path / "run")
    longer = parse_config(private(rounds={"count": 4}))
    resume(fork(tmp_path / "run", tmp_path / "longer", longer))
    assert [line["round"] for line in ledger(tmp_path / "longer")] == [1, 2, 3, 4]
    plain = parse_config(private({"name": "ffa-lora"}) | {"strategy": {"name": "ffa-lora"}})
    with pytest.raises(ConfigError, match="promise of privacy"):
        fork(tmp_path / "run", tmp_path / "plain", plain)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"strategy": {"name": "fedprox", "inner": {"name": "central-dp"}}}, "outermost"),
        ({"strategy": {"name": "central-dp", "expected-sites": 3}}, "leave the key out"),
        ({"strategy": {"name": "central-dp", "delta": 0.2}}, "promises nothing"),
        ({"strategy": {"name": "central-dp"}, "fleet": {"clients": 8, "speeds": [1.0]}}, "sample"),
        ({"training": {"dp": {}}, "engine": {"cohort": 4}}, "one by one"),
        ({"training": {"dp": {}}, "data": {"holdout": 0.2}}, "holdout = 0.2"),
        ({"training": {"dp": {}}, "engine": {"gradient-checkpointing": True}}, "run into twice"),
        (
            {
                "training": {"dp": {}},
                "strategy": {"name": "fedbuff", "size": 2},
                "fleet": {"clients": 8, "speeds": [1.0]},
            },
            "fedbuff is asynchronous",
        ),
        *(
            ({"training": {"dp": {}}, "lora": {"method": method}}, f"not '{method}'")
            for method in ("dora", "vera", "ia3", "loha", "lokr")
        ),
        (
            {
                "training": {"dp": {}},
                "lora": {"method": "hydralora", "heads": 2},
                "strategy": {"name": "hydralora"},
            },
            "not 'hydralora'",
        ),
    ],
)
def test_what_the_account_could_not_cover_is_refused(
    change: dict[str, Any], word: str, tiny_table: Table
) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_config({**tiny_table(), **change})


def test_real_sites_are_not_a_poisson_sample() -> None:
    with pytest.raises(ConfigError, match="come and go"):
        check_real(parse_config({"strategy": {"name": "central-dp"}}))


def test_the_ledger_is_plain_json(private: Table, tmp_path: Path) -> None:
    simulate(parse_config(private(rounds={"count": 1})), tmp_path / "run")
    (line,) = (tmp_path / "run" / "privacy.jsonl").read_text().splitlines()
    assert json.loads(line) == {"round": 1, "site": [0.8, 0.25]}


def test_the_forecast_says_what_an_undisturbed_run_will_spend(
    private: Table, tiny_table: Table, tmp_path: Path
) -> None:
    table = private({"target-epsilon": 5.0})
    cost = forecast(parse_config(table))
    run = Run(simulate(parse_config(table), tmp_path / "run").path)
    assert cost["privacy"]["site"]["epsilon"] == run.rounds[-1]["privacy"]["site"]["epsilon"]
    assert "privacy by client" in as_text(parse_config(table), cost)
    assert "privacy" not in forecast(parse_config(tiny_table()))
    examples = {"steps": 3, "dp": {"noise-multiplier": 2.0}}
    (spent,) = forecast(parse_config(tiny_table(training=examples)))["privacy"].values()
    # 204 training rows over 8 sites are 25 a site; batches of 4, 3 steps in each of 4 rounds.
    assert spent["sampling_rate"] == 4 / 25
    assert spent["epsilon"] == privacy.example_epsilon([(2.0, 4 / 25, 12)], DELTA)


def test_sites_that_drop_out_are_accounted_for(private: Table, tmp_path: Path) -> None:
    """Row 67: no retry and no quorum; the sum lacks them, the denominator and the account do not."""
    config = parse_config(private(rounds={"per-round": 8}))
    lost = Faults((Fault("drop", round=2, message_type="train"),))
    with InlineGrid("fedft.clients.app:app", config.fleet.clients, faults=lost) as grid:
        run = Run(simulate(config, tmp_path / "run", grid=grid).path)
    second = run.rounds[1]
    assert len(second["cohort"]) == 8, "rate 1"
    assert second["failures"] == {"timeout": second["cohort"]}
    assert [line["round"] for line in ledger(run.directory)] == [1, 2, 3]
    assert [line["attempts"] for line in run.rounds] == [1, 1, 1]
    assert run.rounds[-1]["privacy"]["site"]["epsilon"] == spent(run.directory, q=1.0)
