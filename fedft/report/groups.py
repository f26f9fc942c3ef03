"""Which runs belong together: the seeds of one rule under one setting."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedft.core.errors import ConfigError
from fedft.report.records import BASELINE, Record, clean, flatten, number


@dataclass(frozen=True)
class Group:
    """The runs of one rule that differ in nothing but the seed.

    Attributes:
        label: the rule's name, and whatever tells it from its neighbours.
        strategy: the rule's name.
        context: settings outside the rule that vary within the comparison; groups are compared
            with the baseline of their own context only.
        runs: by seed, ascending.
    """

    label: str
    strategy: str
    context: tuple[tuple[str, str], ...]
    runs: dict[int, Record]

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
        percent: whether it is a share, shown in percent and its differences in points.
        higher: whether more is better.
    """

    keys: tuple[str, str]
    title: str
    percent: bool
    higher: bool

    @property
    def of_sites(self) -> tuple[str, str]:
        """Where the mean of the same score over the sites' own models and data stands."""
        return ("sites", self.keys[1])

    @property
    def word(self) -> str:
        """``accuracy``, ``perplexity`` or ``loss``."""
        return self.keys[1]


METRICS = (
    Metric(("eval", "accuracy"), "Test accuracy", percent=True, higher=True),
    Metric(("eval", "perplexity"), "Test perplexity", percent=False, higher=False),
    Metric(("eval", "loss"), "Test loss", percent=False, higher=False),
    Metric(("sites", "accuracy"), "Sites' own accuracy", percent=True, higher=True),
    Metric(("train", "loss"), "Training loss", percent=False, higher=False),
)


def metric_of(records: Sequence[Record]) -> Metric:
    """The first of the metrics that any of the runs has."""
    return next((m for m in METRICS if any(r.series(*m.keys) for r in records)), METRICS[-1])


def group(records: Sequence[Record]) -> list[Group]:
    """Runs by rule and setting, the baseline first, the rest by label.

    Settings outside ``[strategy]`` tell groups apart only where one rule was run under several of
    them; a setting that merely goes with a rule (a tuned learning rate) does not.

    Raises:
        ConfigError: two runs of one group have the same seed.
    """
    flat = [_settings(record) for record in records]
    outer = _varying(records, flat, strategy=False)
    inner = _varying(records, flat, strategy=True)
    runs: dict[tuple[str, tuple[tuple[str, str], ...], str], dict[int, Record]] = {}
    for record, settings in zip(records, flat, strict=True):
        context = tuple((key, settings.get(key, "—")) for key in outer)
        own = tuple((key, settings[key]) for key in inner if key in settings)
        label = " ".join([record.strategy, *_words(own), *_words(context)])
        members = runs.setdefault((record.strategy, context, label), {})
        if record.seed in members:
            raise ConfigError(
                f"{members[record.seed].path} and {record.path} are the same run: {label}, seed {record.seed}",
                fix="Name one of the two.",
            )
        members[record.seed] = record
    groups = [
        Group(label, strategy, context, dict(sorted(members.items())))
        for (strategy, context, label), members in runs.items()
    ]
    return sorted(groups, key=lambda g: (g.strategy != BASELINE, g.context, g.label))


def baseline_of(one: Group, groups: Sequence[Group]) -> Group | None:
    """The baseline under the same settings; None for a baseline itself, or where there is none."""
    if one.strategy == BASELINE:
        return None
    return next((g for g in groups if g.strategy == BASELINE and g.context == one.context), None)


def _settings(record: Record) -> dict[str, str]:
    """What identifies a configuration. Engine settings do not change results, and seeds are paired."""
    return {
        key: clean(value, 40)
        for key, value in flatten(record.config).items()
        if key != "seed" and not key.startswith("engine.")
    }


def _varying(
    records: Sequence[Record], flat: Sequence[dict[str, str]], *, strategy: bool
) -> list[str]:
    """Keys that take several values among the runs of one rule."""
    seen: dict[tuple[str, str], set[str | None]] = {}
    keys = dict.fromkeys(key for settings in flat for key in settings)
    wanted = [key for key in keys if key.startswith("strategy.") == strategy]
    for record, settings in zip(records, flat, strict=True):
        for key in wanted:
            seen.setdefault((record.strategy, key), set()).add(settings.get(key))
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
