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
"""

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import median
from typing import Any

from fedft.core import entropy
from fedft.core.batches import batch_count
from fedft.core.errors import ConfigError, EnvironmentFailure, IntegrityError, SecurityRefusal
from fedft.core.rundir import RunDir
from fedft.core.types import Site
from server.config import RunConfig
from server.roster import Roster, SimulatedRoster
from strategies import CentralDP

_TOLERANCE = 1e-3
"""Of a solved noise multiplier."""

_INTERVAL = 1e-3
"""Width of the steps in which privacy losses are rounded up: ten times the library's default, for a
tenth of its time. The figure stays an upper bound, and moves in the sixth digit."""


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
        return self._roster.poisson(sampling_rate(self._config), entropy.generator())

    def spend(self, round_: int, cohort: Sequence[Site]) -> None:
        """Enter an attempt at a round. When this returns, the line is on disk.

        Raises:
            SecurityRefusal: the attempt would exceed ``target-epsilon``; nothing is entered.
        """
        line = self._entry(round_, cohort)
        self._check_budget([*self._lines, line])
        self._run.append_release(line)
        self._lines.append(line)

    def guarantee(self) -> dict[str, Any]:
        """What has been spent so far, for ``rounds.jsonl``."""
        spent: dict[str, Any] = {}
        if (rule := _central(self._config)) is not None:
            spent["site"] = {
                "epsilon": _spent_by_site(self._lines, rule.delta),
                "delta": rule.delta,
                "noise_multiplier": rule.noise_multiplier,
                "sampling": "poisson",
                "sampling_rate": sampling_rate(self._config),
                "adjacency": "add or remove one site",
                "releases": len(self._lines),
            }
        if (dp := self._config.training.dp) is not None:
            each = example_epsilons(self._lines, dp.delta)
            spent["example"] = {
                "epsilon": max(each.values(), default=0.0),
                "median": median(each.values()) if each else 0.0,
                "delta": dp.delta,
                "noise_multiplier": dp.noise_multiplier,
                "sampling": "poisson",
                "adjacency": "add or remove one example of a site",
                "sites": len(each),
            }
        return spent

    def of_sites(self, names: Sequence[str]) -> dict[str, float]:
        """Example-level ε of some sites so far; empty without ``[training] dp``."""
        dp = self._config.training.dp
        return {} if dp is None else example_epsilons(self._lines, dp.delta, names)

    def _entry(self, round_: int, cohort: Sequence[Site]) -> dict[str, Any]:
        line: dict[str, Any] = {"round": round_}
        if (rule := _central(self._config)) is not None:
            line["site"] = [rule.noise_multiplier, sampling_rate(self._config)]
        if (dp := self._config.training.dp) is not None:
            line["example"] = {
                site.name: [dp.noise_multiplier, *local_steps(self._config, site.examples)]
                for site in cohort
            }
        return line

    def _check_budget(self, lines: Sequence[Mapping[str, Any]]) -> None:
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
    return _central(config) is not None or config.training.dp is not None


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
    training = config.training
    steps = batch_count(examples, training.batch_size, epochs=training.epochs, steps=training.steps)
    return min(1.0, training.batch_size / examples), steps


def _central(config: RunConfig) -> CentralDP | None:
    return config.strategy if isinstance(config.strategy, CentralDP) else None


# ── ε ─────────────────────────────────────────────────────────────────────────────────────────

Event = tuple[float, float, int]
"""Noise multiplier, sampling rate, and how often."""


def _spent_by_site(lines: Sequence[Mapping[str, Any]], delta: float) -> float:
    counts = Counter(
        (float(z), float(q)) for z, q in (line["site"] for line in lines if "site" in line)
    )
    return site_epsilon([(z, q, n) for (z, q), n in sorted(counts.items())], delta)


def example_epsilons(
    lines: Sequence[Mapping[str, Any]], delta: float, names: Sequence[str] | None = None
) -> dict[str, float]:
    """Each site's own ε, by name: of those named, or of all that ever took part."""
    steps: dict[str, Counter[tuple[float, float]]] = {}
    for line in lines:
        for name, (z, rate, count) in line.get("example", {}).items():
            if names is None or name in names:
                steps.setdefault(name, Counter())[float(z), float(rate)] += count
    return {
        name: example_epsilon([(z, q, n) for (z, q), n in sorted(own.items())], delta)
        for name, own in sorted(steps.items())
    }


def site_epsilon(events: Sequence[Event], delta: float) -> float:
    """ε of Gaussian mechanisms on Poisson samples, by privacy loss distributions.

    Args:
        events: what was released; none is ε = 0.
        delta: of the guarantee.
    """
    return _pld(tuple(events), delta) if events else 0.0


def example_epsilon(events: Sequence[Event], delta: float) -> float:
    """As :func:`site_epsilon` by Opacus's Rényi accountant: a hundred times faster, some 10 % higher.

    A round has as many accounts as sites, each with its own rate.
    """
    return _rdp(tuple(events), delta) if events else 0.0


@lru_cache(maxsize=256)
def _pld(events: tuple[Event, ...], delta: float) -> float:
    dp = _accounting()
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=_INTERVAL)
    for event in events:
        accountant.compose(_composed(dp, *event))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=65536)
def _rdp(events: tuple[Event, ...], delta: float) -> float:
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise _not_installed("opacus") from error
    accountant = RDPAccountant()
    accountant.history = list(events)
    with warnings.catch_warnings():
        # "Optimal order is the largest alpha": a tighter figure exists, this one holds.
        warnings.simplefilter("ignore", UserWarning)
        return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=64)
def solved_noise(target: float, rate: float, releases: int, delta: float) -> float:
    """The smallest noise multiplier, to a thousandth, with which ``releases`` spend at most ``target``.

    Raises:
        ConfigError: none below a million does.
    """
    dp = _accounting()
    from dp_accounting.mechanism_calibration import NoBracketIntervalFoundError
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    def event(z: float) -> Any:
        return _composed(dp, z, rate, releases)

    try:
        # Rényi accounting asks for a little more noise than is needed, at no cost: it brackets.
        above = dp.calibrate_dp_mechanism(
            lambda: RdpAccountant(_ORDERS), event, target, delta, tol=_TOLERANCE
        )
        z = dp.calibrate_dp_mechanism(
            lambda: PLDAccountant(value_discretization_interval=_INTERVAL),
            event,
            target,
            delta,
            dp.ExplicitBracketInterval(above / 2, above),
            tol=_TOLERANCE,
        )
    except (ValueError, NoBracketIntervalFoundError) as error:
        raise ConfigError(
            f"[strategy] target-epsilon = {target}: no noise multiplier comes to it ({error})",
            fix="Raise the target, or lower [rounds] count or per-round.",
        ) from error
    return math.ceil(z / _TOLERANCE) * _TOLERANCE


_ORDERS = (*range(2, 64), 96, 128, 256, 512, 1024)
"""Of Rényi divergences. Whole numbers, for which the sampled mechanism has a finite sum."""


def _composed(dp: Any, noise_multiplier: float, rate: float, count: int) -> Any:
    once = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise_multiplier))
    return dp.SelfComposedDpEvent(once, count)


def _accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise _not_installed("dp-accounting") from error
    return dp_accounting


def _not_installed(package: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"{package} is not installed, and this run promises differential privacy",
        fix="pip install 'fedft[privacy]'",
    )
