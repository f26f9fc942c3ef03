"""Groups, choices, budgets, and whole runs of layer-pruned sites."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType

from fedft.clients.resident import workbench
from fedft.core.errors import ConfigError
from fedft.core.memory import MIB, Footprint, Geometry, Load, footprint
from fedft.core.models import geometry, initial_adapter, load_of, resolve, schema
from fedft.core.record.rundir import RunDir
from fedft.core.similarity import linear_cka, upper
from fedft.core.sublayers import HALVES, Layer, Sublayer, children
from fedft.core.types import Adapter, Factors, ServerState, Site, TrainPlan, in_blocks
from fedft.core.wire import codec
from fedft.server.block_groups import contiguous_groups, spectral_groups
from fedft.server.config_file import parse_config
from fedft.server.forecast import as_text, forecast
from fedft.server.grids.inline import InlineGrid
from fedft.server.pruning import Pruning, PruningSpec, narrowed, pruning_of
from fedft.server.resolve import resolved
from fedft.server.run import fork, resume, simulate
from fedft.server.setting import CLIENT_APP, prepare_run

L = 6


def draw(seed: int, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def similarity(seed: int = 0, noise: float = 0.5) -> np.ndarray:
    """Of six blocks that change a little each; block 3 starts something new."""
    features = [draw(seed, 20, 8)]
    for b in range(1, L):
        fresh = draw(seed + 10 * b, 20, 8)
        features.append(fresh if b == 3 else features[-1] + noise * fresh)
    return linear_cka(features).numpy()


def pruning(selection: str = "cka", affordable: int = 3, **fields: Any) -> Pruning:
    spec = PruningSpec(selection=selection, **fields)  # type: ignore[arg-type]
    return Pruning(spec, lambda site: affordable, L, seed=0, sizes=(affordable,))


def measured(own: Pruning, importance: list[float] | None = None) -> ServerState:
    S = torch.as_tensor(similarity())
    weights = torch.tensor(importance or [0.5, 0.1, 0.2, 0.4, 0.1, 0.3])
    return own.learned(ServerState(Adapter({})), [(upper(S), weights, 8)])


@pytest.mark.parametrize("divide", [contiguous_groups, spectral_groups])
@pytest.mark.parametrize("count", range(1, L + 1))
def test_groups_partition_the_blocks(divide: Callable[..., list[list[int]]], count: int) -> None:
    for seed in range(5):
        groups = divide(similarity(seed), count)
        assert len(groups) == count
        assert sorted(b for group in groups for b in group) == list(range(L))
        assert all(group == sorted(group) for group in groups)
        assert divide(similarity(seed), count) == groups
    if divide is contiguous_groups:
        assert [b for group in groups for b in group] == list(range(L))


@pytest.mark.parametrize("divide", [contiguous_groups, spectral_groups])
@pytest.mark.parametrize("count", range(2, L))
def test_duplicated_blocks_fall_into_one_group(
    divide: Callable[..., list[list[int]]], count: int
) -> None:
    """T4.6."""
    X = [draw(b, 20, 8) for b in range(L)]
    X[4] = X[3]
    groups = divide(linear_cka(X).numpy(), count)
    assert any({3, 4} <= set(group) for group in groups)


def test_runs_are_the_best_of_all_runs() -> None:
    S = similarity(7)

    def worth(cuts: tuple[int, ...]) -> float:
        bounds = [0, *cuts, L]
        return sum(S[a:b, a:b].sum() / (b - a) for a, b in pairwise(bounds))

    for count in range(1, L + 1):
        found = contiguous_groups(S, count)
        best = max(map(worth, combinations(range(1, L), count - 1)))
        assert worth(tuple(group[0] for group in found[1:])) == pytest.approx(best)


@pytest.mark.parametrize("grouping", ["contiguous", "spectral"])
def test_one_block_of_each_group_by_site_and_round(grouping: str) -> None:
    own = pruning(grouping=grouping)
    state = measured(own)
    groups = own.groups(state, 3)
    seen: set[tuple[int, ...]] = set()
    for k in range(30):
        layers = own.layers(state, Site(f"site-{k}", 1))
        assert layers is not None
        assert sorted(layers) == list(layers)
        assert [sum(b in layers for b in group) for group in groups] == [1, 1, 1]
        assert layers == own.layers(state, Site(f"site-{k}", 1))
        seen.add(layers)
    assert len(seen) > 1
    later = replace(state, round=state.round + 1)
    sites = [Site(f"site-{k}", 1) for k in range(30)]
    assert [own.layers(state, s) for s in sites] != [own.layers(later, s) for s in sites]


def test_a_cold_draw_takes_the_most_important() -> None:
    own = pruning(tau=1e-6)
    state = measured(own, [0.1, 0.9, 0.2, 0.3, 0.8, 0.7])
    best = tuple(
        max(g, key=[0.1, 0.9, 0.2, 0.3, 0.8, 0.7].__getitem__) for g in own.groups(state, 3)
    )
    assert own.layers(state, Site("a", 1)) == best == own.typical(state, 3)


def test_the_baselines() -> None:
    state = ServerState(Adapter({}))
    assert pruning("first").layers(state, Site("a", 1)) == (0, 1, 2)
    assert pruning("last").layers(state, Site("a", 1)) == (3, 4, 5)
    assert pruning("stride").layers(state, Site("a", 1)) == (0, 2, 4)
    assert pruning("stride", 4).layers(state, Site("a", 1)) == (0, 1, 3, 4)
    by_importance = pruning("importance")
    assert by_importance.layers(measured(by_importance), Site("a", 1)) == (0, 3, 5)
    drawn = {pruning("random").layers(state, Site(f"s{k}", 1)) for k in range(40)}
    assert len(drawn) > 8
    assert all(layers is not None and len(layers) == 3 for layers in drawn)
    assert pruning("random", L).layers(state, Site("a", 1)) is None


def test_similarities_are_means_by_rows_and_measured_again_when_due() -> None:
    own = pruning(every=2)
    start = ServerState(Adapter({}))
    assert own.due(start)
    answers = [(torch.full((15,), v), torch.full((L,), 10 * v), n) for v, n in [(0.2, 1), (0.6, 3)]]
    state = own.learned(start, answers)
    assert state.slots["pruning/similarity"][0, 1] == pytest.approx(0.5)
    assert state.slots["pruning/importance"].tolist() == pytest.approx([5.0] * L)
    assert [own.due(replace(state, round=r)) for r in range(4)] == [False, False, True, True]
    assert not pruning("random").due(start)


def test_a_plan_is_narrowed_once_for_all_that_hold_the_same() -> None:
    factors = {f"m.layer.{b}.q": Factors(draw(b, 2, 4), draw(b, 3, 2), 1.0) for b in range(L)}
    head = {"base_model.model.classifier.weight": draw(9, 3, 3)}
    plan = TrainPlan(Adapter(factors, head), delta=factors)
    one, two = narrowed(plan, (1, 4)), narrowed(replace(plan, site="b"), (1, 4))
    assert one.start is two.start
    assert one.delta is two.delta
    assert list(one.sent()) == [
        n for n in plan.sent() if ".1." in n or ".4." in n or "head" in n or "classifier" in n
    ]
    assert list(one.delta) == ["m.layer.1.q", "m.layer.4.q"]
    assert narrowed(plan, None) is plan
    grown = narrowed(replace(plan, delta={}), (1, 4))
    assert not grown.delta


def test_tables_stay_in_their_file_only_where_memory_is_limited(
    tiny_table: Callable[..., dict[str, Any]],
) -> None:
    def base(**changes: Any) -> float:
        return forecast(parse_config(tiny_table(**changes)))["clients"][-1]["memory_mib"]["base"]

    words = 29 * 32 * 4 / MIB
    limited = {"fleet": {"memory-budgets-mib": [99]}}
    assert base() - base(**limited) == pytest.approx(words)
    assert base(**limited, lora={"method": "dora"}) == pytest.approx(base())
    held_in_bf16 = {"engine": {"precision": "bf16"}}
    assert base(**limited, **held_in_bf16) == pytest.approx(base(**held_in_bf16))


def test_a_budget_is_solved_for_blocks() -> None:
    own = Footprint({"base": 10.0 * MIB}, [{"base": 2.0 * MIB}] * 4)
    assert own.of(3) == {"base": 16 * MIB, "total": 16 * MIB}
    assert [own.affordable(b) for b in (11.9, 12.0, 15.9, 18.0, 99.0, None)] == [0, 1, 2, 4, 4, 4]


def test_the_plan_says_what_each_kind_of_site_takes(
    tiny_table: Callable[..., dict[str, Any]],
) -> None:
    changes: dict[str, Any] = {
        "fleet": {"model-shares": [0.5, 1.0]},
        "pruning": {"selection": "cka"},
    }
    config = parse_config(tiny_table(**changes))
    cost = forecast(config)
    part, whole = cost["clients"]
    assert (part["blocks"], whole["blocks"]) == ([1, 2], [2, 2])
    head = 3 * 32 + 3
    assert part["trainable"] - head == (whole["trainable"] - head) / 2
    assert part["bytes"]["up"] == 4 * part["trainable"]
    assert part["memory_mib"]["total"] < whole["memory_mib"]["total"]
    text = as_text(config, cost)
    assert "with 1 of 2 blocks" in text
    both = whole["checkpointing_mib"]
    assert both["off"] == whole["memory_mib"]["total"] > both["on"]
    assert text.count("MiB with gradient checkpointing on") == 2
    if cost["framework_mib"] is not None:
        assert f"{cost['framework_mib']:.0f} MiB that this process takes" in text
    small = forecast(parse_config(tiny_table(**changes, engine={"gradient-checkpointing": True})))
    assert small["clients"][1]["memory_mib"]["total"] == both["on"]
    assert small["clients"][1]["checkpointing_mib"] == both
    poor = parse_config(tiny_table(fleet={"memory-budgets-mib": [0.01]}))
    with pytest.raises(ConfigError, match="the whole model takes"):
        forecast(poor)


# ── halves of blocks ──────────────────────────────────────────────────────────────────────────

HALF_BY_HALF: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 8, "target-modules": "all-linear"},
    "fleet": {"model-shares": [0.5, 1.0]},
    "pruning": {"selection": "cka", "granularity": "sublayer", "every": 2},
}


def test_halves_are_chosen_as_blocks_are_and_named_by_block() -> None:
    """Six layers to choose from: the halves of three blocks."""
    state = ServerState(Adapter({}))
    site = Site("a", 1)
    first = pruning("first", granularity="sublayer")
    assert first.layers(state, site) == ((0, "attention"), (0, "feed-forward"), (1, "attention"))
    own, blocks = pruning(granularity="sublayer"), pruning()
    known = measured(own)
    indices = blocks.layers(known, site)
    assert own.layers(known, site) == own.named(indices)  # type: ignore[arg-type]
    assert own.typical(known, 3) == own.named(blocks.typical(known, 3))  # type: ignore[arg-type]
    assert own.facts(known, [site]) == blocks.facts(known, [site])  # by index in both
    assert pruning("random", L, granularity="sublayer").layers(state, site) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_budget_for_halves_holds_whichever_are_drawn(precision: Any) -> None:
    sizes = Geometry(3, 8, 32, 2, 8, True, 700, 50, halves=(300, 400))
    load = Load(batch=2, tokens=5, scored=0, trainable=10, trainable_per_block=7,
                trainable_of_halves=(4, 3))  # fmt: skip
    whole = footprint(sizes, load, precision)
    needs = footprint(sizes, load, precision, "sublayer")
    assert (whole.layers, needs.layers) == (3, 6)
    assert needs.of() == pytest.approx(whole.of())
    width = 4 if precision == "fp32" else 2
    assert sorted(one["base"] for one in needs.each) == [300 * width] * 3 + [400 * width] * 3
    for held in range(1, 7):
        chosen = combinations([sum(one.values()) for one in needs.each], held)
        most = sum(needs.fixed.values()) + max(map(sum, chosen))
        assert needs.of(held)["total"] == pytest.approx(most)
        assert needs.affordable(needs.mib(held)) == held


def test_adapted_layers_keep_their_inputs(tiny_table: Callable[..., dict[str, Any]]) -> None:
    """Of width 32 in attention; 32 and 64 in the feed-forward part. Frozen layers keep none."""
    counted: list[float] = []
    for names in (["query", "value"], ["key"], ["query", "intermediate.dense"], "all-linear"):
        config = parse_config(tiny_table(lora={"rank": 4, "alpha": 8, "target-modules": names}))
        shapes = schema(config.model, config.lora, 3)
        sizes = geometry(config.model, resolve(config.model))
        load = load_of(shapes, 2, 4, batch=1, tokens=1, scored=1)
        counted.append(footprint(sizes, load, "fp32").each[0]["activations"] / 4)
    fewest = 5 * 32 + 2 * 32 + 64
    assert counted == [fewest, fewest, fewest + 32, fewest + 32 + 64]


def test_the_plan_counts_halves(tiny_table: Callable[..., dict[str, Any]]) -> None:
    config = parse_config(tiny_table(**HALF_BY_HALF))
    cost = forecast(config)
    part, whole = cost["clients"]
    assert (part["sublayers"], whole["sublayers"]) == ([2, 4], [4, 4])
    assert part["memory_mib"]["total"] < whole["memory_mib"]["total"]
    assert part["bytes"]["up"] == 4 * part["trainable"] < whole["bytes"]["up"]
    assert "with 2 of 4 sublayers" in as_text(config, cost)
    by_block = parse_config(tiny_table(**HALF_BY_HALF | {"pruning": {"selection": "cka"}}))
    assert forecast(by_block)["clients"][1]["memory_mib"] == pytest.approx(whole["memory_mib"])


def test_blocks_that_cannot_be_divided_are_refused(
    tiny_table: Callable[..., dict[str, Any]],
) -> None:
    plain = parse_config(tiny_table(**HALF_BY_HALF | {"lora": {"rank": 4, "alpha": 8}}))
    with pytest.raises(ConfigError, match=r"no layer of the feed-forward part is adapted"):
        forecast(plain)
    config = parse_config(tiny_table(**HALF_BY_HALF))
    sizes = geometry(config.model, resolve(config.model))
    shapes = schema(config.model, config.lora, 3)
    assert pruning_of(config, shapes, sizes)[0] is not None
    with pytest.raises(ConfigError, match="cannot be told apart"):
        pruning_of(config, shapes, replace(sizes, halves=None))


# ── whole runs ────────────────────────────────────────────────────────────────────────────────


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]


def summary(path: Path) -> dict[str, Any]:
    return json.loads((path / "summary.json").read_text())


Table = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("cohort", [1, 4])
@pytest.mark.parametrize(
    ("selection", "rule"),
    [("cka", "lora-fair"), ("importance", "fedavg-lora"), ("random", "fedsa-lora")],
)
def test_a_run_of_pruned_sites(
    tiny_table: Table, tmp_path: Path, selection: str, rule: str, cohort: int
) -> None:
    changes: dict[str, Any] = {
        "fleet": {"model-shares": [0.5, 1.0]},
        "pruning": {"selection": selection, "every": 2},
        "strategy": {"name": rule},
        "engine": {"cohort": cohort},
    }
    config = parse_config(tiny_table(**changes))
    run = simulate(config, tmp_path / "run")
    records = lines(run.path)
    held = [h for r in records for h in r["pruning"]["held"].values()]
    assert held
    assert all(len(layers) == 1 for layers in held)  # half of two blocks
    assert {b for h in held for b in h} == {0, 1} if selection != "importance" else True
    assert set(records[-1]["submodels"]) == {"1"}
    assert records[-1]["submodels"]["1"].keys() == records[-1]["eval"].keys()
    # A pruned site sends, and gets, half of the factors.
    replies = [json.loads(line) for line in (run.path / "clients.jsonl").read_text().splitlines()]
    for reply in (r for r in replies if r["kind"] == "train"):
        layers = records[reply["round"] - 1]["pruning"]["held"].get(reply["site"])
        a_block = 2 * 4 * 32 if rule == "fedsa-lora" else 2 * 4 * (32 + 32)
        head = 0 if rule == "fedsa-lora" else 3 * 32 + 3
        assert reply["bytes_up"] == 4 * ((1 if layers else 2) * a_block + head)
    if selection == "random":
        assert "measured" not in records[0]["pruning"]
    else:
        assert [r["pruning"]["measured"]["round"] for r in records] == [1, 1, 3, 3]


@pytest.mark.parametrize(
    ("cohort", "selection", "rule"),
    [(4, "cka", "lora-fair"), (1, "importance", "fedavg-lora"), (4, "random", "flora")],
)
def test_a_run_of_sites_that_hold_halves(
    tiny_table: Table, tmp_path: Path, cohort: int, selection: str, rule: str
) -> None:
    changes = HALF_BY_HALF | {
        "pruning": HALF_BY_HALF["pruning"] | {"selection": selection},
        "strategy": {"name": rule},
        "engine": {"cohort": cohort},
    }
    config = parse_config(tiny_table(**changes))
    run = simulate(config, tmp_path / "run")
    records = lines(run.path)
    shapes = schema(config.model, config.lora, 3)
    head = 3 * 32 + 3
    replies = [json.loads(line) for line in (run.path / "clients.jsonl").read_text().splitlines()]
    for reply in (r for r in replies if r["kind"] == "train"):
        held = records[reply["round"] - 1]["pruning"]["held"].get(reply["site"], range(4))
        assert len(held) in (2, 4)
        layers = tuple(Sublayer(k // 2, HALVES[k % 2]) for k in held)
        factors = sum(4 * sum(shape) for m, shape in shapes.modules.items() if in_blocks(m, layers))
        assert reply["bytes_up"] == 4 * (factors + head)
    drawn = [h for r in records for h in r["pruning"]["held"].values()]
    assert {len(h) for h in drawn} == {2}
    assert set(records[-1]["submodels"]) == {"2"}
    assert records[-1]["submodels"]["2"] != records[-1]["eval"]
    if selection != "random":
        assert len(records[-1]["pruning"]["measured"]["importance"]) == 4
    if selection == "cka":
        assert sorted(k for g in records[-1]["pruning"]["groups"]["2"] for k in g) == [0, 1, 2, 3]


def test_engines_agree_on_a_run_by_halves(tiny_table: Table, tmp_path: Path) -> None:
    finals: list[dict[str, float]] = []
    for cohort in (1, 4):
        changes = HALF_BY_HALF | {"engine": {"cohort": cohort}}
        run = simulate(parse_config(tiny_table(**changes)), tmp_path / f"run-{cohort}")
        finals.append(lines(run.path)[-1]["train"])
    assert finals[0] == pytest.approx(finals[1], rel=1e-4)


def test_sites_judge_the_part_that_they_hold(tiny_table: Table, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "fleet": {"model-shares": [0.5]},
        "pruning": {"selection": "first"},
        "data": {"holdout": 0.3},
        "strategy": {"name": "fedsa-lora"},
    }
    run = simulate(parse_config(tiny_table(**changes)), tmp_path / "run")
    assert lines(run.path)[-1]["sites"]["n"] == 4


@pytest.mark.parametrize("layers", [(1,), (Sublayer(1, "attention"),)])
def test_a_site_that_holds_a_part_has_nothing_else_in_memory(
    tiny_table: Table, tmp_path: Path, layers: tuple[Layer, ...]
) -> None:
    """The task of a site with a memory budget, through the client app: the same bytes come back."""
    answers: list[dict[str, torch.Tensor]] = []
    for lean in (False, True):
        config = resolved(parse_config(tiny_table(engine={"cohort": 2})))
        with RunDir.create(tmp_path / f"lean-{lean}", hint="x") as run:
            setting = prepare_run(config, run)
            task = setting.task.model_copy(update={"lean": lean}).model_dump_json()
            initial = initial_adapter(setting.shapes, config.lora, 4, 0)
            name = setting.manifest.name_of(0)
            plan = narrowed(TrainPlan(initial, round=1, site=name), layers)
            with InlineGrid(CLIENT_APP, config.fleet.clients) as grid:
                message = Message(
                    codec.Encoder(task).train(plan), 1, MessageType.TRAIN, group_id="1"
                )
                ids = grid.push_jobs([[message]])
                grid.wait(ids)
                (reply,) = grid.pull_messages(ids)
        answers.append(codec.tensors_from(reply.content.array_records["arrays"]))
        base = workbench(task).engine.base
        assert base.lean == lean
        halves = [children(block, half).values() for block in base.blocks for half in HALVES]
        absent = [all(p.is_meta for m in half for p in m.parameters()) for half in halves]
        assert absent == [lean, lean, False, lean and layers != (1,)]
    assert answers[0].keys() == answers[1].keys() == plan.sent().keys()
    assert all(torch.equal(answers[0][n], answers[1][n]) for n in answers[0])


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_all_blocks_for_all_is_the_run_without_pruning_bit_for_bit(
    tiny_table: Table, tmp_path: Path, granularity: str
) -> None:
    """T4.2."""
    lora: dict[str, Any] = {"lora": HALF_BY_HALF["lora"]}
    plain = simulate(parse_config(tiny_table(**lora)), tmp_path / "plain")
    changes: dict[str, Any] = lora | {
        "fleet": {"model-shares": [1.0]},
        "pruning": {"selection": "random", "granularity": granularity},
    }
    whole = simulate(parse_config(tiny_table(**changes)), tmp_path / "whole")
    assert summary(plain.path)["adapter_sha256"] == summary(whole.path)["adapter_sha256"]
    assert summary(plain.path)["history_sha256"] == summary(whole.path)["history_sha256"]


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_a_pruned_run_goes_on_as_if_it_had_never_stopped(
    tiny_table: Table, tmp_path: Path, granularity: str
) -> None:
    changes = HALF_BY_HALF | {
        "pruning": {"selection": "cka", "every": 3, "granularity": granularity},
        "strategy": {"name": "flora"},
    }
    whole = simulate(parse_config(tiny_table(**changes)), tmp_path / "whole")
    part = parse_config(tiny_table(**changes, rounds={"count": 2}))
    simulate(part, tmp_path / "part")
    fork(tmp_path / "part", tmp_path / "rest", parse_config(tiny_table(**changes)))
    rest = resume(tmp_path / "rest")
    assert summary(rest.path)["adapter_sha256"] == summary(whole.path)["adapter_sha256"]
    assert summary(rest.path)["history_sha256"] == summary(whole.path)["history_sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pruning": {"selection": "cka"}, "fleet": {"memory-budgets-mib": [0.01]}},
            r"one block .* takes \d+ MiB",
        ),
        ({"fleet": {"memory-budgets-mib": [0.01]}}, "the whole model takes"),
    ],
)
def test_a_budget_that_is_too_small_is_refused_with_both_figures(
    tiny_table: Table, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        simulate(parse_config(tiny_table(**changes)), tmp_path / "run")
    assert refused.value.exit_code == 2
    assert "grants 0 MiB" in refused.value.what
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruning": {"selection": "cka"}, "lora": {"layers": [0]}}, "layers cannot stand beside"),
        ({"pruning": {"selection": "cka"}, "lora": {"method": "dora"}}, "needs .* method"),
        ({"fleet": {"model-shares": [0.5], "memory-budgets-mib": [9]}}, "either these or MiB"),
        ({"fleet": {"model-shares": [1.5]}}, "must be at most 1"),
        ({"pruning": {"selection": "ckaa"}}, "selection"),
        (
            {"pruning": {"selection": "cka"}, "strategy": {"name": "central-dp"}},
            "noise on every layer",
        ),
    ],
)
def test_what_cannot_be_pruned_is_refused(
    tiny_table: Table, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(tiny_table(**changes))
