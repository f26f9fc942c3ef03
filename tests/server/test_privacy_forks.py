"""Forks of private runs: one account covers all of a chain, or the fork is refused."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedft.core.errors import ConfigError, IntegrityError
from fedft.core.privacy.accounting import example_epsilon, site_epsilon
from fedft.core.record.rundir import RunDir
from fedft.core.types import Site
from fedft.server.config import RunConfig
from fedft.server.config_file import parse_config
from fedft.server.privacy import PrivacyAccount, units
from fedft.server.resolve import resolved
from fedft.server.run import fork, resume, simulate

Table = Callable[..., dict[str, Any]]
COHORT = [Site("ann", 40), Site("bob", 25)]


def config_of(
    site: tuple[float, float] | None, example: tuple[float, float] | None, per_round: int = 2
) -> RunConfig:
    """A run with (noise multiplier, delta) for whole sites, for examples, both or neither."""
    table: dict[str, Any] = {
        "fleet": {"clients": 8},
        "rounds": {"count": 9, "per-round": per_round},
        "training": {"batch-size": 4, "steps": 2},
        "engine": {"backend": "inline", "cohort": 1, "precision": "fp32"},
        "strategy": {"name": "ffa-lora"},
    }
    if site is not None:
        table["strategy"] = {"name": "central-dp", "noise-multiplier": site[0], "delta": site[1]}
    if example is not None:
        table["training"]["dp"] = {"noise-multiplier": example[0], "delta": example[1]}
    return resolved(parse_config(table))


def started(folder: Path, config: RunConfig) -> Path:
    """A run directory as it is before the first round."""
    with RunDir.create(folder) as run:
        run.write_config(config.to_toml())
        run.write_environment({}, {})
    return folder


def attempts(folder: Path, count: int) -> dict[str, Any]:
    """Enter so many attempts at rounds, as the rounds do; what the run then says it has spent."""
    with RunDir.open(folder, writing=True) as run:
        config = parse_config_of(run)
        if not units(config):
            return {}
        account = PrivacyAccount(config, run, SimpleNamespace(), 0)  # type: ignore[arg-type]
        for round_ in range(count):
            account.spend(round_ + 1, COHORT)
        return account.guarantee()


def parse_config_of(run: RunDir) -> RunConfig:
    from fedft.server.config_file import parse_toml

    return parse_toml(run.config, "config.toml")


class Books:
    """All that a chain ever released, kept apart from the code under test."""

    def __init__(self) -> None:
        self.site: list[tuple[float, float, int]] = []
        self.example: list[tuple[float, float, int]] = []  # of ann, who is in every cohort
        self.delta = {"site": 1.0, "example": 1.0}

    def enter(self, config: RunConfig, count: int) -> None:
        strategy: Any = config.strategy
        if "site" in units(config):
            self.site += [(strategy.noise_multiplier, config.rounds.per_round / 8, 1)] * count
            self.delta["site"] = min(self.delta["site"], strategy.delta)
        if (dp := config.training.dp) is not None:
            bob = (dp.noise_multiplier, 4 / 25, 2)  # the smaller site spends more
            self.example += [bob] * count
            self.delta["example"] = min(self.delta["example"], dp.delta)

    def spent(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.site:
            found["site"] = site_epsilon(summed(self.site), self.delta["site"])
        if self.example:
            found["example"] = example_epsilon(summed(self.example), self.delta["example"])
        return found


def summed(events: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    return [
        (z, q, sum(n for a, b, n in events if (a, b) == (z, q)))
        for z, q in sorted({(z, q) for z, q, _ in events})
    ]


def names_only_its_own(config: RunConfig, lines: Sequence[Any]) -> dict[str, float]:
    """How a fork accounted before: in the units and at the delta of its own configuration."""
    told: dict[str, float] = {}
    strategy: Any = config.strategy
    if "site" in units(config):
        own = [(*line["site"], 1) for line in lines if "site" in line]
        told["site"] = site_epsilon(summed(own), strategy.delta)
    if (dp := config.training.dp) is not None:
        own = [tuple(line["example"]["bob"]) for line in lines if "example" in line]
        told["example"] = example_epsilon(summed(own), dp.delta)
    return told


mechanism = st.one_of(
    st.none(), st.tuples(st.sampled_from([0.8, 1.0, 3.0]), st.sampled_from([1e-6, 1e-5, 1e-3]))
)
links = st.lists(
    st.tuples(mechanism, mechanism, st.booleans(), st.sampled_from([2, 4]), st.integers(0, 3)),
    min_size=2,
    max_size=6,
)


def is_below(told: dict[str, float], books: Books) -> bool:
    return any(told.get(unit, 0.0) < spent * (1 - 1e-9) for unit, spent in books.spent().items())


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(chain=links, first=st.tuples(mechanism, mechanism))
def test_over_any_chain_of_forks_no_epsilon_is_below_what_was_spent(
    chain: list[Any], first: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    config = config_of(*first)
    run = started(folder / "0", config)
    books = Books()
    attempts(run, 2)
    books.enter(config, 2)
    promised = units(config)
    for k, (*asked, keep, per_round, count) in enumerate(chain, start=1):
        if keep:  # half of the forks keep the units, so that chains get long
            asked = [b and (a or (0.9, 1e-6)) for a, b in zip(asked, first, strict=True)]
        changed = config_of(*asked, per_round)
        try:
            following = fork(run, folder / str(k), changed)
        except ConfigError:
            assert not (folder / str(k)).exists(), "a refused fork leaves nothing"
            continue
        assert units(changed) == promised, "no account begins or ends in a chain"
        run = following
        told = attempts(run, count)
        books.enter(changed, count)
        assert told.keys() == promised
        spent = {unit: one["epsilon"] for unit, one in told.items()}
        assert not is_below(spent, books)
        for unit, one in told.items():
            assert one["delta"] <= books.delta[unit] * (1 + 1e-9)
            assert one["epsilon"] == pytest.approx(books.spent()[unit], rel=1e-6)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (((1.0, 1e-5), None), (None, (1.0, 1e-5))),
        ((None, (1.0, 1e-5)), ((1.0, 1e-5), None)),
        (((1.0, 1e-5), (1.0, 1e-5)), ((1.0, 1e-5), None)),
        (((1.0, 1e-6), None), ((1.0, 1e-3), None)),
        ((None, (1.0, 1e-6)), (None, (1.0, 1e-3))),
    ],
)
def test_the_books_notice_a_fork_that_accounts_for_itself_only(
    before: Any, after: Any, tmp_path: Path
) -> None:
    """The control: these forks would say less than was spent; each is refused."""
    run = started(tmp_path / "run", config_of(*before))
    attempts(run, 3)
    books = Books()
    books.enter(config_of(*before), 3)
    own = names_only_its_own(config_of(*after), RunDir.open(run).releases())
    assert is_below(own, books)
    with pytest.raises(ConfigError, match=r"promise|delta"):
        fork(run, tmp_path / "fork", config_of(*after))


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ((None, None), ((1.0, 1e-5), None), "nobody, and the fork whole clients"),
        ((None, None), (None, (1.0, 1e-5)), "nobody, and the fork single examples"),
        (((1.0, 1e-5), None), (None, None), "whole clients, and the fork nobody"),
        ((None, (1.0, 1e-5)), (None, None), "single examples, and the fork nobody"),
        (((1.0, 1e-5), None), (None, (1.0, 1e-5)), "whole clients, and the fork single examples"),
        ((None, (1.0, 1e-5)), ((1.0, 1e-5), None), "single examples, and the fork whole clients"),
        (((1.0, 1e-5), None), ((1.0, 1e-5), (1.0, 1e-5)), "whole clients and single examples"),
        (((1.0, 1e-5), (1.0, 1e-5)), ((1.0, 1e-5), None), "the fork whole clients"),
        (((1.0, 1e-5), None), ((1.0, 1e-4), None), "each client at delta = 1e-05"),
        ((None, (1.0, 1e-5)), (None, (1.0, 1e-4)), "each example at delta = 1e-05"),
        (((1.0, 1e-5), None), ((0.5, 1e-6), None), None),
        ((None, (1.0, 1e-5)), (None, (9.0, 1e-5)), None),
        ((None, None), (None, None), None),
    ],
)
def test_what_a_fork_may_change(before: Any, after: Any, word: str | None, tmp_path: Path) -> None:
    run = started(tmp_path / "run", config_of(*before))
    if word is None:
        fork(run, tmp_path / "fork", config_of(*after))
        return
    with pytest.raises(ConfigError, match=word) as refused:
        fork(run, tmp_path / "fork", config_of(*after))
    assert refused.value.fix and not (tmp_path / "fork").exists()


def test_a_ledger_with_releases_of_another_unit_stops_the_run(tmp_path: Path) -> None:
    """Whoever swaps the configuration in place, or forked with an older version."""
    run = started(tmp_path / "run", config_of((1.0, 1e-5), None))
    attempts(run, 2)
    other = config_of(None, (1.0, 1e-5))
    with RunDir.open(run, writing=True) as old:
        config = parse_config_of(old)
        assert PrivacyAccount(config, old, SimpleNamespace(), 0).guarantee()  # type: ignore[arg-type]
        with pytest.raises(IntegrityError, match="no account covers both"):
            PrivacyAccount(other, old, SimpleNamespace(), 0)  # type: ignore[arg-type]


def test_a_fork_with_other_noise_says_the_weakest_of_it(tiny_table: Table, tmp_path: Path) -> None:
    """A real run, forked twice: ε grows over all of them, and no figure beside it is too good."""

    def config(z: float, rounds: int) -> RunConfig:
        return parse_config(
            tiny_table(
                strategy={"name": "central-dp", "noise-multiplier": z},
                rounds={"count": rounds, "per-round": 2, "evaluate-every": 1},
                training={"steps": 1},
            )
        )

    simulate(config(0.7, 1), tmp_path / "0")
    told = [RunDir.open(tmp_path / "0").summary()["privacy"]["site"]]
    for k, z in enumerate((5.0, 1.0), start=1):
        fork(tmp_path / str(k - 1), tmp_path / str(k), config(z, k + 1))
        told.append(resume(tmp_path / str(k)).summary()["privacy"]["site"])
    assert [one["releases"] for one in told] == [1, 2, 3]
    assert told[0]["epsilon"] < told[1]["epsilon"] < told[2]["epsilon"] < math.inf
    assert told[2]["noise_multiplier"] == 0.7
    events = [(0.7, 0.25, 1), (1.0, 0.25, 1), (5.0, 0.25, 1)]
    assert told[2]["epsilon"] == site_epsilon(events, 1e-5)
