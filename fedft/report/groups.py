"""Which runs belong together: the seeds of one rule, or arm, under one setting."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedft.core.errors import ConfigError, FedftError
from fedft.core.metrics import Declared, declared_in
from fedft.report.records import BASELINE, Json, Record, clean, flatten, number
from fedft.report.statistics import CONFIDENCE, Interval, check_seeds, interval, paired


@dataclass(frozen=True)
class Group:
    """The runs of one arm of a comparison (most often a rule) that differ in nothing but the seed.

    Attributes:
        label: the arm's name, and whatever tells it from its neighbours.
        arm: its name.
        strategy: name of its rule.
        baseline: whether the others are compared with it.
        context: settings that vary within the arms of the comparison; groups are compared with
            the baseline of their own context only.
        runs: by seed, ascending.
        confidence: two-sided level of the intervals over the seeds.
    """

    label: str
    arm: str
    strategy: str
    baseline: bool
    context: tuple[tuple[str, str], ...]
    runs: dict[int, Record]
    confidence: float = CONFIDENCE

    def interval(self, values: Iterable[float]) -> Interval | None:
        """Mean and interval over the seeds, see :func:`~fedft.report.statistics.interval`."""
        return interval(list(values), self.confidence)

    def gain(self, other: "Group | None", *keys: str) -> Interval | None:
        """Final value minus that of ``other``, paired by seed; None where there is no other."""
        if other is None:
            return None
        return paired(self.values(*keys), other.values(*keys), self.confidence)

    def values(self, *keys: str) -> dict[int, float]:
        """Seed → the final value of a key of ``rounds.jsonl``."""
        found = {seed: run.final(*keys) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def means(self, *keys: str) -> dict[int, float]:
        """Seed → the mean over the rounds of a key of ``rounds.jsonl``."""
        found = {seed: run.mean(*keys) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Metric:
    """What a run is judged by.

    Attributes:
        keys: where it stands in a line of ``rounds.jsonl``.
        title: in words.
        word: the metric alone in words: ``accuracy``, ``perplexity`` or ``loss``.
        percent: whether it is a share, shown in percent and its differences in points.
        higher: whether more is better.
    """

    keys: tuple[str, str]
    title: str
    word: str
    percent: bool
    higher: bool

    @property
    def of_sites(self) -> tuple[str, str]:
        """Where the mean of the same score over the sites' own models and data stands."""
        return ("sites", self.keys[1])

    @property
    def of_start(self) -> tuple[str, str]:
        """Where the score before the first round stands."""
        return ("start", self.keys[1])

    @property
    def name(self) -> str:
        """Of the metric, as records spell it."""
        return self.keys[1]


TEST_LOSS = Metric(("eval", "loss"), "Test loss", "loss", percent=False, higher=False)
TRAINING_LOSS = Metric(("train", "loss"), "Training loss", "loss", percent=False, higher=False)


def metrics_of(records: Sequence[Record]) -> list[Metric]:
    """The metrics that any of the runs has: what their tasks declare, in order, then losses."""
    declared = dict.fromkeys(d for r in records for d in declared_in(r.environment))

    def at(place: str, title: str, metric: Declared) -> Metric:
        word = clean(metric.title, 40)
        percent, higher = metric.percent is True, metric.higher is True
        return Metric((place, clean(metric.name, 40)), f"{title} {word}", word, percent, higher)

    known = [
        *(at("eval", "Test", metric) for metric in declared),
        TEST_LOSS,
        *(at("sites", "Clients' own", metric) for metric in declared),
        TRAINING_LOSS,
    ]
    return [m for m in known if any(r.series(*m.keys) for r in records)]


def metric_of(records: Sequence[Record]) -> Metric:
    """The first of the metrics that any of the runs has."""
    return next(iter(metrics_of(records)), TRAINING_LOSS)


def further(records: Sequence[Record], first: Metric) -> list[Metric]:
    """The other metrics of the test set; the loss has a figure of its own."""
    found = metrics_of(records)
    return [m for m in found if m.keys[0] == "eval" and m not in (first, TEST_LOSS)]


def with_start(record: Record, metric: Metric) -> dict[int, float]:
    """Round → score of the test set, round 0 among them where the run was scored before it began."""
    values = record.series(*metric.keys)
    if metric.keys[0] != "eval" or (start := record.final(*metric.of_start)) is None:
        return values
    return {0: start, **values}


def group(records: Sequence[Record], confidence: float | None = None) -> list[Group]:
    """Runs by arm and setting, the baseline first, the rest by label.

    Settings outside ``[strategy]`` tell groups apart only where one arm was run under several of
    them; a setting that merely goes with an arm (a tuned learning rate) does not.

    Args:
        records: of the runs.
        confidence: level of the intervals; None takes 0.95 and shows none where there is one seed.

    Raises:
        ConfigError: two runs of one group have the same seed, or an interval is asked for and some
            group has one seed only.
    """
    flat = [_settings(config) for config in _completed([record.config for record in records])]
    outer = _varying(records, flat, strategy=False)
    inner = _varying(records, flat, strategy=True)
    runs: dict[tuple[str, tuple[tuple[str, str], ...]], dict[int, Record]] = {}
    for record, settings in zip(records, flat, strict=True):
        context = tuple((key, settings.get(key, "—")) for key in outer)
        own = tuple((key, settings[key]) for key in inner if key in settings)
        label = " ".join([record.arm, *_words(own), *_words(context)])
        members = runs.setdefault((label, context), {})
        if record.seed in members:
            raise ConfigError(
                f"{members[record.seed].path} and {record.path} are the same run: {label}, seed {record.seed}",
                fix="Name one of the two.",
            )
        members[record.seed] = record
    level = CONFIDENCE if confidence is None else confidence
    rule_is_there = any(record.arm == BASELINE for record in records)
    groups: list[Group] = []
    for (label, context), members in runs.items():
        one = next(iter(members.values()))
        if confidence is not None:
            check_seeds(len(members), confidence, label)
        baseline = one.arm == (BASELINE if rule_is_there else next(iter(one.arms), BASELINE))
        by_seed = dict(sorted(members.items()))
        groups.append(Group(label, one.arm, one.strategy, baseline, context, by_seed, level))
    return sorted(groups, key=lambda g: (not g.baseline, g.context, g.label))


def baseline_of(one: Group, groups: Sequence[Group]) -> Group | None:
    """The baseline under the same settings; None for a baseline itself, or where there is none."""
    if one.baseline:
        return None
    return next((g for g in groups if g.baseline and g.context == one.context), None)


def baseline_name(groups: Sequence[Group]) -> str:
    """What the others are compared with, in words."""
    names = {g.arm for g in groups if g.baseline}
    return names.pop() if len(names) == 1 else "the baseline"


def _completed(configs: Sequence[Json]) -> Sequence[Json]:
    """The configurations with defaults where some of them lack keys that others have.

    An older version wrote fewer keys; it ran with what are their defaults now.
    """

    def outside(config: Json) -> frozenset[str]:
        return frozenset(key for key in flatten(config) if not key.startswith("strategy."))

    if len(set(map(outside, configs))) < 2:
        return configs
    from fedft.server.config_file import parse_config  # loads torch: only where it is needed

    def complete(config: Json) -> Json:
        try:
            return parse_config(config).model_dump(mode="json", by_alias=True, exclude_none=True)
        except FedftError:
            return config

    return [complete(config) for config in configs]


def _settings(config: Json) -> dict[str, str]:
    """What identifies a configuration. Engines and meters change no result, and seeds are paired."""
    return {
        key: clean(value, 40)
        for key, value in flatten(config).items()
        if key != "seed" and not key.startswith(("engine.", "evaluation.meters"))
    }


def _varying(
    records: Sequence[Record], flat: Sequence[dict[str, str]], *, strategy: bool
) -> list[str]:
    """Keys that take several values among the runs of one arm."""
    seen: dict[tuple[str, str], set[str | None]] = {}
    keys = dict.fromkeys(key for settings in flat for key in settings)
    wanted = [key for key in keys if key.startswith("strategy.") == strategy]
    for record, settings in zip(records, flat, strict=True):
        for key in wanted:
            seen.setdefault((record.arm, key), set()).add(settings.get(key))
    return [key for key in wanted if any(len(v) > 1 for (_, k), v in seen.items() if k == key)]


def _words(settings: Sequence[tuple[str, str]]) -> list[str]:
    """``data.partition.alpha`` = 0.1 as ``alpha=0.1``; in full where the last word is not enough."""
    last = [key.rsplit(".", 1)[-1] for key, _ in settings]
    return [
        f"{short if last.count(short) == 1 else key}={value}"
        for short, (key, value) in zip(last, settings, strict=True)
    ]


def traffic(record: Record) -> float | None:
    """Bytes up and down over the whole run."""
    stated = [number(record.summary or {}, "bytes", way) for way in ("up", "down")]
    summed = [record.total("bytes", way) for way in ("up", "down")]
    total = sum(s if m is None else m for m, s in zip(stated, summed, strict=True))
    return total or None
