"""The privacy account of a run: what was released, and what ε that comes to.

Two mechanisms can be on, alone or together:

    site       ``[strategy] name = "central-dp"``: the adapter protects whole sites. Every round is a
               Gaussian mechanism on a Poisson sample of the sites. Accountant: privacy loss
               distributions (dp-accounting), adjacency: one site more or less.
    example    ``[training] dp``: what a site sends protects each of its examples, from the server
               too. Every local step is a Gaussian mechanism on a Poisson sample of the site's
               examples. Accountant: Rényi DP (Opacus), adjacency: one example more or less, for
               each site on its own.

The ledger, ``privacy.jsonl`` in the run directory, gets a line for every *attempt* at a round, on
disk before the first plan of the attempt is sent, hence before anything that depends on data
leaves a site or the server. ε is computed from the ledger, never from the completed rounds: a run
that is killed anywhere and resumed repeats its round with fresh noise and a fresh cohort, and both
attempts count. The account can be too high that way, by the attempts that released nothing; it
cannot be too low.

A fork carries the ledger over and keeps the units and at least the δ of its promise, see
:func:`check_fork`: every line of a ledger is then about every unit that the run promises, under
whichever noise and rate it was released.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from fedft.core.data.batches import poisson_schedule
from fedft.core.errors import ConfigError, IntegrityError, SecurityRefusal
from fedft.core.privacy import WORDS, entropy
from fedft.core.privacy.accounting import example_epsilon, site_epsilon, solved_noise
from fedft.core.record.lines import Promise, Release
from fedft.core.record.rundir import RunDir
from fedft.core.types import Site
from fedft.server.config import RunConfig
from fedft.server.sampling import Roster, SimulatedRoster
from fedft.strategies import CentralDP


class PrivacyAccount:
    """The ledger of one run, open for its next round.

    Args:
        config: resolved.
        run: its directory, locked.
        roster: the registered sites.
        completed: rounds committed so far.

    Raises:
        IntegrityError: the ledger does not cover the rounds that were committed.
    """

    def __init__(self, config: RunConfig, run: RunDir, roster: Roster, completed: int) -> None:
        self._config = config
        self._roster = roster
        self._run = run
        self._lines = run.releases()
        missing = set(range(1, completed + 1)) - {line["round"] for line in self._lines}
        if missing:
            raise IntegrityError(
                f"{run.path}/privacy.jsonl has no line for round {min(missing)}, which was completed: "
                "what this run has released is not known",
                fix="Restore the file from a copy; a run without it cannot go on.",
            )
        promised = units(config)
        for line in self._lines:
            if units_of(line) != promised:
                raise IntegrityError(
                    f"{run.path}/privacy.jsonl has a release that protects {_named(units_of(line))} in "
                    f"round {line['round']}, and this run promises to protect {_named(promised)}: no "
                    "account covers both",
                    fix="Restore config.toml and privacy.jsonl from a copy, or start a new run.",
                )

    @property
    def poisson(self) -> bool:
        """Whether it draws the cohorts."""
        return _central(self._config) is not None

    def cohort(self) -> list[Site]:
        """A Poisson sample of the sites, by the operating system's randomness.

        Who was in a round is what the amplification by sampling relies on nobody knowing, and the
        run's seed stands in its configuration.
        """
        assert isinstance(self._roster, SimulatedRoster)  # check_real refuses the others
        return self._roster.poisson(sampling_rate(self._config), entropy.Keystream())

    def spend(self, round_: int, cohort: Sequence[Site]) -> None:
        """Enter an attempt at a round. When this returns, the line is on disk.

        Raises:
            SecurityRefusal: the attempt would exceed ``target-epsilon``; nothing is entered.
        """
        line = self._entry(round_, cohort)
        self._check_budget([*self._lines, line])
        self._run.append_release(line)
        self._lines.append(line)

    def guarantee(self) -> Promise:
        """What has been spent so far, for ``rounds.jsonl``.

        Where releases differed, after a fork, noise multiplier and rate are the least private ones; ε
        is of all releases as they were.
        """
        spent: Promise = {}
        if (rule := _central(self._config)) is not None:
            spent["site"] = {
                "epsilon": _spent_by_site(self._lines, rule.delta),
                "delta": rule.delta,
                "noise_multiplier": min([rule.noise_multiplier, *(z for z, _ in self._sites())]),
                "sampling": "poisson",
                "sampling_rate": max([sampling_rate(self._config), *(q for _, q in self._sites())]),
                "adjacency": "add or remove one client",
                "releases": len(self._lines),
            }
        if (dp := self._config.training.dp) is not None:
            each = example_epsilons(self._lines, dp.delta)
            spent["example"] = {
                "epsilon": max(each.values(), default=0.0),
                "median": median(each.values()) if each else 0.0,
                "delta": dp.delta,
                "noise_multiplier": min([dp.noise_multiplier, *self._example_noises()]),
                "sampling": "poisson",
                "adjacency": "add or remove one example of a client",
                "sites": len(each),
            }
        return spent

    def of_sites(self, names: Sequence[str]) -> dict[str, float]:
        """Example-level ε of some sites so far; empty without ``[training] dp``."""
        dp = self._config.training.dp
        return {} if dp is None else example_epsilons(self._lines, dp.delta, names)

    def _sites(self) -> list[tuple[float, float]]:
        return [(float(z), float(q)) for z, q in _site_releases(self._lines)]

    def _example_noises(self) -> list[float]:
        return [float(own[0]) for line in self._lines for own in line.get("example", {}).values()]

    def _entry(self, round_: int, cohort: Sequence[Site]) -> Release:
        line: Release = {"round": round_}
        if (rule := _central(self._config)) is not None:
            line["site"] = [rule.noise_multiplier, sampling_rate(self._config)]
        if (dp := self._config.training.dp) is not None:
            line["example"] = {
                site.name: [dp.noise_multiplier, *local_steps(self._config, site.examples)]
                for site in cohort
            }
        return line

    def _check_budget(self, lines: Sequence[Release]) -> None:
        rule = _central(self._config)
        if rule is None or rule.target_epsilon is None:
            return
        spent = _spent_by_site(lines, rule.delta)
        if spent > rule.target_epsilon:
            raise SecurityRefusal(
                f"round {lines[-1]['round']} would spend ε = {spent:.4g}, and target-epsilon is "
                f"{rule.target_epsilon:.4g}",
                fix="The adapter of the last completed round stands, within the target: fedft export.",
            )


def open_account(
    config: RunConfig, run: RunDir, roster: Roster, completed: int
) -> PrivacyAccount | None:
    """The account of a run that promises privacy; None of one that does not."""
    return PrivacyAccount(config, run, roster, completed) if promises(config) else None


def promises(config: RunConfig) -> bool:
    """Whether a run has a privacy guarantee of either kind."""
    return bool(units(config))


def units(config: RunConfig) -> frozenset[str]:
    """Whom a run promises to protect: ``site``, ``example``, both or nobody."""
    return frozenset(_deltas(config))


def units_of(line: Release) -> frozenset[str]:
    """Whom a release protects, by its line in the ledger."""
    return frozenset({"site", "example"} & line.keys())


def check_fork(old: RunConfig, new: RunConfig) -> None:
    """Whether one account can cover what was released before a fork and what will be after it.

    Noise, bounds, rates and rules may change: accounts add up releases of any strength. The unit may
    not: rounds that protected examples say nothing about whole sites, so that neither account
    would cover all of the run. Nor may δ grow, by which ε would be lower than what was spent.

    Raises:
        ConfigError: it cannot.
    """
    if units(old) != units(new):
        raise ConfigError(
            f"this run promises to protect {_named(units(old))}, and the fork {_named(units(new))}: a "
            "fork cannot begin or end a promise of privacy, because no account would cover the rounds "
            "before it and those after",
            fix="Keep the mechanisms of the run ([strategy] central-dp, [training] dp), or start a new "
            "run.",
        )
    now = _deltas(new)
    for unit, delta in _deltas(old).items():
        if now[unit] > delta:
            raise ConfigError(
                f"this run accounts for each {WORDS[unit]} at delta = {delta:g}, and the fork at "
                f"{now[unit]:g}: its epsilon would be below what is spent already",
                fix=f"Choose a delta of at most {delta:g}.",
            )


def _deltas(config: RunConfig) -> dict[str, float]:
    """Unit → δ of its promise."""
    found: dict[str, float] = {}
    if (rule := _central(config)) is not None:
        found["site"] = rule.delta
    if (dp := config.training.dp) is not None:
        found["example"] = dp.delta
    return found


def _named(found: frozenset[str]) -> str:
    words = {"site": "whole clients", "example": "single examples"}
    return " and ".join(words[unit] for unit in words if unit in found) or "nobody"


def resolved_privacy(config: RunConfig) -> RunConfig:
    """The configuration with the noise multiplier and the mean cohort that it comes to.

    Raises:
        ConfigError: no noise multiplier reaches the target.
    """
    rule = _central(config)
    if rule is None:
        return config
    table = rule.model_dump() | {"expected_sites": config.rounds.per_round}
    if rule.target_epsilon is not None:
        table["noise_multiplier"] = solved_noise(
            rule.target_epsilon, sampling_rate(config), config.rounds.count, rule.delta
        )
    return config.model_copy(update={"strategy": CentralDP.model_validate(table)})


def forecast_privacy(config: RunConfig, examples: int) -> dict[str, Any]:
    """What a resolved run will spend if nothing is repeated, as :meth:`PrivacyAccount.guarantee`.

    Args:
        config: of the run.
        examples: training examples of all sites together. The example-level figure is that of a
            site of the mean size that takes part in every round.
    """
    spent: dict[str, Any] = {}
    if (rule := _central(config)) is not None:
        event = (rule.noise_multiplier, sampling_rate(config), config.rounds.count)
        spent["site"] = {"epsilon": site_epsilon([event], rule.delta), "delta": rule.delta}
        spent["site"] |= {"noise_multiplier": rule.noise_multiplier, "sampling_rate": event[1]}
    if (dp := config.training.dp) is not None:
        rate, steps = local_steps(config, max(1, examples // config.fleet.clients))
        event = (dp.noise_multiplier, rate, steps * config.rounds.count)
        spent["example"] = {"epsilon": example_epsilon([event], dp.delta), "delta": dp.delta}
        spent["example"] |= {"noise_multiplier": dp.noise_multiplier, "sampling_rate": rate}
    return spent


def sampling_rate(config: RunConfig) -> float:
    """q: the probability with which each registered site takes part in a round."""
    return config.rounds.per_round / config.fleet.clients


def local_steps(config: RunConfig, examples: int) -> tuple[float, int]:
    """Rate and number of a site's DP-SGD steps in one round."""
    return poisson_schedule(examples, config.training.local())


def _central(config: RunConfig) -> CentralDP | None:
    return config.strategy if isinstance(config.strategy, CentralDP) else None


# ── ε ─────────────────────────────────────────────────────────────────────────────────────────


def _spent_by_site(lines: Sequence[Release], delta: float) -> float:
    counts = Counter((float(z), float(q)) for z, q in _site_releases(lines))
    return site_epsilon([(z, q, n) for (z, q), n in sorted(counts.items())], delta)


def _site_releases(lines: Sequence[Release]) -> list[Sequence[float]]:
    """Noise multiplier and sampling rate of every release that protects whole sites."""
    return [line["site"] for line in lines if "site" in line]


def example_epsilons(
    lines: Sequence[Release], delta: float, names: Sequence[str] | None = None
) -> dict[str, float]:
    """Each site's own ε, by name: of those named, or of all that ever took part."""
    steps: dict[str, Counter[tuple[float, float]]] = {}
    for line in lines:
        for name, (z, rate, count) in line.get("example", {}).items():
            if names is None or name in names:
                steps.setdefault(name, Counter())[float(z), float(rate)] += int(count)
    return {
        name: example_epsilon([(z, q, n) for (z, q), n in sorted(own.items())], delta)
        for name, own in sorted(steps.items())
    }
