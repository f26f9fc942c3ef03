"""The laws that every rule keeps, as one table. A new rule is a file and a row here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fedft import strategies
from fedft.conformance.federation import (
    EXPERTS,
    RANK,
    SHAPES,
    distance,
    fleet,
    function,
    initial,
    reply,
    warm,
)
from fedft.conformance.laws import Law
from fedft.conformance.rules import LAWS, the_table_is_the_rule
from fedft.core import meters
from fedft.core.errors import ConfigError
from fedft.core.folding import fold
from fedft.core.types import ClientUpdate, Site
from fedft.core.wire import codec
from fedft.strategies import (
    CentralDP,
    CoordinateMedian,
    ExactMixedRank,
    FedAdam,
    FedAsync,
    FedAvgLoRA,
    FedAvgM,
    FedBuff,
    FedDyn,
    FedExLoRA,
    FedMomentum,
    FedNova,
    FedProx,
    FedRotLoRA,
    FedSALoRA,
    FedSB,
    FedSVD,
    FedYogi,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    HydraLoRA,
    Krum,
    LoRAFAIR,
    MultiKrum,
    NormClip,
    RaFLoRA,
    RoLoRA,
    Scaffold,
    Strategy,
    TrimmedMean,
)

ANY = TypeAdapter(strategies.AnyStrategy)


# ── the wire, in numbers a round (methods.md, section B) ──────────────────────────────────────

IN = sum(n for _, n in SHAPES.values())
OUT = sum(m for m, _ in SHAPES.values())
HEADS = 4 * 5 + 4
NARROW = [min(shape) for shape in SHAPES.values()]


def pi(r: int) -> int:
    return r * (IN + OUT)


def delta(rank: int, cap: int = 10**9) -> int:
    """Numbers of a base change of ``rank``, stored at no more than d = min(d_out, d_in, cap)."""
    return sum(
        min(rank, d, cap) * (m + n) for d, (m, n) in zip(NARROW, SHAPES.values(), strict=True)
    )


def momentum(t: int, K: int, cap: int = 10**9) -> tuple[int, int]:
    """A round's residual has rank min(d, K r) - r."""
    residual = sum(
        min((t - 1) * (min(d, K * RANK) - RANK), d, cap) * (m + n)
        for d, (m, n) in zip(NARROW, SHAPES.values(), strict=True)
    )
    return pi(RANK) + residual + HEADS, pi(RANK) + HEADS


Wire = Callable[[int, int], tuple[int, int]]
"""(round from 1, sites K) → numbers down and up for one site."""


def both(t: int, K: int) -> tuple[int, int]:
    return pi(RANK) + HEADS, pi(RANK) + HEADS


def twice(t: int, K: int) -> tuple[int, int]:
    """Control variates beside the adapter."""
    return 2 * (pi(RANK) + HEADS), 2 * (pi(RANK) + HEADS)


def fedex(t: int, K: int) -> tuple[int, int]:
    return pi(RANK) + delta((t - 1) * (K - 1) * RANK) + HEADS, pi(RANK) + HEADS


def fed_sb(t: int, K: int) -> tuple[int, int]:
    core = len(SHAPES) * RANK**2
    return both(t, K) if t == 1 else (pi(RANK) + core + HEADS, core + HEADS)


TRIPLE = EXPERTS  # HydraLoRA's heads


def hydra_wire(down: int, up: int, *, A: bool = True, router: bool = False) -> Wire:
    """So many heads down and up, beside A, the router and the task head."""
    shared = A * RANK * IN + router * TRIPLE * IN + HEADS
    return lambda t, K: (shared + down * RANK * OUT, shared + up * RANK * OUT)


@dataclass(frozen=True)
class Row:
    """One rule under test.

    Attributes:
        rule: with its hyperparameters.
        wire: the formula on its page.
        own: a lone client, or identical ones, get exactly that client's function.
        unbiased: the applied update is the mean update.
        layerwise: a layer is made of what its holders sent for it, whatever they sent of others.
    """

    rule: Strategy
    wire: Wire = both
    own: bool = True
    unbiased: bool = False
    layerwise: bool = True


TABLE = {
    "fedavg-lora": Row(FedAvgLoRA()),
    "ffa-lora": Row(
        FFALoRA(), lambda t, K: (RANK * OUT + HEADS, RANK * OUT + HEADS), unbiased=True
    ),
    "lora-fair": Row(LoRAFAIR()),
    "lora-fair cosine": Row(LoRAFAIR(objective="cosine", steps=20)),
    "lora-fair column": Row(LoRAFAIR(objective="cosine", cosine_dim="column", steps=20)),
    "flora": Row(
        FLoRA(),
        lambda t, K: (RANK * IN + delta((t - 1) * K * RANK) + HEADS, pi(RANK) + HEADS),
        unbiased=True,
    ),
    "flora capped": Row(
        FLoRA(delta_rank=2),
        lambda t, K: (RANK * IN + delta((t - 1) * K * RANK, 2) + HEADS, pi(RANK) + HEADS),
        own=False,  # rank 2 cannot hold a client of rank 3
    ),
    "flexlora": Row(FlexLoRA()),
    "hetlora": Row(HetLoRA(gamma=1.0)),
    "raflora": Row(RaFLoRA()),
    "fedex-lora": Row(
        FedExLoRA(),
        fedex,
        unbiased=True,
    ),
    "rolora": Row(
        RoLoRA(),
        lambda t, K: (pi(RANK) + HEADS, RANK * (OUT if t % 2 else IN) + HEADS),
        unbiased=True,
    ),
    "fedsa-lora": Row(FedSALoRA(), lambda t, K: (RANK * IN, RANK * IN)),
    "fedsa-lora shared": Row(
        FedSALoRA(head="shared"), lambda t, K: (RANK * IN + HEADS, RANK * IN + HEADS)
    ),
    "fedrot-lora": Row(FedRotLoRA()),
    "fedsvd": Row(FedSVD(), lambda t, K: (pi(RANK) + HEADS, RANK * OUT + HEADS), unbiased=True),
    "fedmomentum": Row(FedMomentum(), momentum, unbiased=True),
    "flexlora, beyond as the server": Row(FlexLoRA(beyond_rank="server")),
    "hetlora, beyond as the server": Row(HetLoRA(gamma=1.0, beyond_rank="server")),
    "exact-mixed-rank": Row(ExactMixedRank(), momentum, unbiased=True),
    "exact-mixed-rank capped": Row(
        ExactMixedRank(delta_rank=2),
        lambda t, K: (momentum(t, K, cap=2)[0], pi(RANK) + HEADS),
        own=False,  # what was merged is cut again when a lone client's update is added to it
    ),
    "fed-sb": Row(FedSB(), fed_sb),
    "fed-sb seeded": Row(
        FedSB(basis="seeded"),
        lambda t, K: (len(SHAPES) * RANK**2 + HEADS, len(SHAPES) * RANK**2 + HEADS),
        unbiased=True,
    ),
    "fedprox": Row(FedProx(mu=0.1, inner=LoRAFAIR())),
    "scaffold": Row(Scaffold(), twice),
    "scaffold over lora-fair": Row(Scaffold(inner=LoRAFAIR()), twice),
    "scaffold over hetlora": Row(Scaffold(inner=HetLoRA(gamma=1.0, beyond_rank="server")), twice),
    "scaffold over rolora": Row(
        Scaffold(inner=RoLoRA()),
        lambda t, K: (
            pi(RANK) + RANK * (OUT if t % 2 else IN) + 2 * HEADS,
            2 * RANK * (OUT if t % 2 else IN) + 2 * HEADS,
        ),
    ),
    "feddyn": Row(FedDyn(), own=False, layerwise=False),
    "fednova": Row(FedNova(), lambda t, K: (pi(RANK) + HEADS, pi(RANK) + HEADS + 1)),
    "fednova over scaffold": Row(
        FedNova(inner=Scaffold()),
        lambda t, K: (twice(t, K)[0], twice(t, K)[1] + 1),
    ),
    "fedavgm": Row(FedAvgM(beta=0.0, lr=1.0)),
    "fedavgm over flexlora": Row(FedAvgM(inner=FlexLoRA()), own=False),
    "fedadam": Row(FedAdam(inner=LoRAFAIR()), own=False),
    "fedyogi": Row(FedYogi(inner=FedProx(inner=FedRotLoRA())), own=False),
    "fedasync": Row(FedAsync(alpha=1.0)),
    "fedasync over lora-fair": Row(FedAsync(inner=LoRAFAIR()), own=False),
    "fedbuff": Row(FedBuff(size=4)),
    "fedbuff over fedex-lora": Row(FedBuff(size=4, inner=FedExLoRA()), fedex, unbiased=True),
    "norm-clip": Row(NormClip(), layerwise=False),
    "norm-clip over flexlora": Row(NormClip(max_norm=1e9, inner=FlexLoRA())),
    "coordinate-median": Row(CoordinateMedian()),
    "coordinate-median over ffa-lora": Row(
        CoordinateMedian(inner=FFALoRA()), lambda t, K: (RANK * OUT + HEADS, RANK * OUT + HEADS)
    ),
    "trimmed-mean": Row(TrimmedMean()),
    "trimmed-mean over fedavgm": Row(
        TrimmedMean(inner=FedAvgM(beta=0.0, inner=FedSVD())),
        lambda t, K: (pi(RANK) + HEADS, RANK * OUT + HEADS),
    ),
    "krum": Row(Krum(), layerwise=False),
    "krum over flexlora": Row(Krum(inner=FlexLoRA()), layerwise=False),
    "multi-krum": Row(MultiKrum(), layerwise=False),
    # Noise below the last bit, so that what the rule does beside it can be held to the laws. The sum
    # is divided by the number of sites expected, so that no group gets its own function.
    "central-dp": Row(
        CentralDP.model_construct(noise_multiplier=1e-30, expected_sites=4),
        lambda t, K: (RANK * OUT + HEADS, RANK * OUT + HEADS),
        own=False,
        layerwise=False,
    ),
    "central-dp over fedavg-lora": Row(
        CentralDP.model_construct(noise_multiplier=1e-30, expected_sites=4, inner=FedAvgLoRA()),
        own=False,
        layerwise=False,
    ),
    "multi-krum over flexlora": Row(MultiKrum(select=2, inner=FlexLoRA()), layerwise=False),
    "hydralora": Row(
        HydraLoRA(recluster_every=2), hydra_wire(TRIPLE, 1), own=False, layerwise=False
    ),
    "hydralora global": Row(
        HydraLoRA(mode="global"), hydra_wire(TRIPLE, TRIPLE, router=True), layerwise=False
    ),
    "hydralora global, A frozen": Row(
        HydraLoRA(mode="global", freeze_a=True),
        hydra_wire(TRIPLE, TRIPLE, A=False, router=True),
        layerwise=False,
    ),
    "hydralora private": Row(HydraLoRA(mode="private"), hydra_wire(0, 0), layerwise=False),
    "fedadam over hydralora": Row(
        FedAdam(inner=HydraLoRA()), hydra_wire(TRIPLE, 1), own=False, layerwise=False
    ),
}
rows = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


rows = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


# ── the laws ──────────────────────────────────────────────────────────────────────────────────


def test_every_rule_has_a_row_and_a_page() -> None:
    assert {row.rule.name for row in TABLE.values()} == set(strategies.rule_names())  # type: ignore[attr-defined]
    pages = Path(strategies.__file__).parents[2] / "docs" / "strategies"
    for name, rule in zip(strategies.rule_names(), strategies.RULES, strict=True):
        page = (pages / f"{name}.md").read_text(encoding="utf-8")
        assert f'name = "{name}"' in page
        missing = [
            f
            for f, info in rule.model_fields.items()
            if f"`{info.alias}`" not in page and f not in ("name", "inner")
        ]
        assert not missing, f"{name}.md says nothing of {missing}"


laws = pytest.mark.parametrize(
    ("row", "law"),
    [(row, law) for row in TABLE.values() for law in LAWS if law.of(row.rule)],
    ids=[f"{key}: {law.says}" for key, row in TABLE.items() for law in LAWS if law.of(row.rule)],
)


@laws
def test_a_law_holds(row: Row, law: Law[Strategy]) -> None:
    law.check(row.rule)


@rows
def test_the_table_is_the_strategy(row: Row) -> None:
    rule = row.rule
    if isinstance(rule, CentralDP):  # whose noise here is less than any table may ask for
        rule = rule.model_copy(update={"noise_multiplier": 1.0})
    the_table_is_the_rule(rule)


@pytest.mark.parametrize(
    "row", [r for r in TABLE.values() if r.own], ids=[k for k, r in TABLE.items() if r.own]
)
@pytest.mark.parametrize("count", [1, 3])
@dtypes
def test_one_client_or_identical_ones_get_their_own_function(
    row: Row, count: int, dtype: torch.dtype
) -> None:
    rule, state = row.rule, warm(row.rule, dtype)
    updates = [reply(rule, state, Site(f"site-{k}", 4 + k), noise="equal") for k in range(count)]
    after = rule.aggregate(state, updates)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    mine = function(updates[0].adapter, state.delta)
    assert distance(function(after.adapter, after.delta), mine) < tolerance


@pytest.mark.parametrize(
    "row",
    [r for r in TABLE.values() if r.unbiased],
    ids=[k for k, r in TABLE.items() if r.unbiased],
)
@dtypes
def test_exact_rules_have_no_bias(row: Row, dtype: torch.dtype) -> None:
    rule, state = row.rule, warm(row.rule, dtype)
    for _ in range(2):  # both rounds of an alternation
        updates = [reply(rule, state, site) for site in fleet(rule)]
        after = rule.aggregate(state, updates)
        relative = meters.measure(state, fold(updates), after)["bias"]["relative"]
        assert relative is not None
        assert relative < (1e-6 if dtype == torch.float32 else 1e-12)
        state = after


def test_a_rule_of_more_than_the_mean_is_told_from_one_of_the_mean_alone() -> None:
    """Without it, the law of the mean would hold of anything."""
    rule = FlexLoRA()
    state = warm(rule)
    updates = [reply(rule, state, Site(f"site-{k}", 4 + k)) for k in range(4)]
    mean = fold(updates).mean_update(state.adapter)
    lone, whole = rule.aggregate(state, [mean]), rule.aggregate(state, updates)
    x, y = (function(state.adapter, state.delta) for state in (lone, whole))
    assert distance(x, y) > 1e-2


def test_the_yardstick_sees_a_bias() -> None:
    """Without it, the test above could not fail."""
    rule = FedAvgLoRA()
    state = warm(rule)
    updates = [reply(rule, state, site) for site in fleet(rule)]
    relative = meters.measure(state, fold(updates), rule.aggregate(state, updates))["bias"][
        "relative"
    ]
    assert relative is not None
    assert relative > 0.05


@rows
@pytest.mark.parametrize("count", [2, 4])
def test_bytes_on_the_wire_are_the_formula(row: Row, count: int) -> None:
    """At one rank, over four rounds: long enough for every base change to reach its ceiling."""
    rule = row.rule
    sites = [Site(f"site-{k}", 3) for k in range(count)]
    state = initial(rule, torch.float32)
    for t in range(1, 5):
        plan = rule.plan(state, sites[0])
        updates = [reply(rule, state, site) for site in sites]
        down = codec.content_bytes(codec.Encoder("task").train(plan))
        up = codec.content_bytes(
            codec.reply_content(updates[0].tensors, 3, {}, records=updates[0].records)
        )
        expected_down, expected_up = row.wire(t, count)
        assert (down, up) == (4 * expected_down, 4 * expected_up), f"round {t}"
        state = rule.aggregate(state, updates)


@pytest.mark.parametrize(
    "row",
    [r for r in TABLE.values() if r.layerwise],
    ids=[k for k, r in TABLE.items() if r.layerwise],
)
def test_layers_that_only_some_sites_hold(row: Row) -> None:
    """Averaged over those who do; a layer that nobody holds is kept."""
    rule, state = row.rule, warm(row.rule)
    held, missing = SHAPES
    full = [reply(rule, state, Site(f"site-{k}", 5 + k)) for k in range(3)]

    def without(u: ClientUpdate, module: str) -> ClientUpdate:
        return replace(u, tensors={n: t for n, t in u.tensors.items() if f".{module}." not in n})

    some = rule.aggregate(state, [full[0], without(full[1], missing), without(full[2], missing)])
    lone = rule.aggregate(state, [full[0]])
    everyone = rule.aggregate(state, full)
    for after, module in ((lone, missing), (everyone, held)):
        x, y = some.adapter.factors[module], after.adapter.factors[module]
        assert torch.allclose(x.product(), y.product(), rtol=1e-10)
    nobody = rule.aggregate(state, [without(u, missing) for u in full])
    assert torch.equal(
        nobody.adapter.factors[missing].product(), state.adapter.factors[missing].product()
    )


def test_mixed_ranks_are_refused_by_name() -> None:
    able = {"flora", "flexlora", "hetlora", "raflora", "fedmomentum", "exact-mixed-rank"}
    combinators = {
        r.model_fields["name"].default for r in strategies.RULES if "inner" in r.model_fields
    }
    for row in TABLE.values():
        strategies.check_ranks(row.rule, [4, 4])  # type: ignore[arg-type]
        inner = row.rule
        while inner.name in combinators:  # type: ignore[attr-defined]
            inner = inner.inner  # type: ignore[attr-defined]
        if inner.name in able:  # type: ignore[attr-defined]
            strategies.check_ranks(row.rule, [4, 8, None])  # type: ignore[arg-type]
            continue
        with pytest.raises(ConfigError) as caught:
            strategies.check_ranks(row.rule, [4, 8])  # type: ignore[arg-type]
        assert row.rule.name in caught.value.what  # type: ignore[attr-defined]
        assert all(name in caught.value.fix for name in able)


def test_a_rank_above_the_global_one_is_refused() -> None:
    state = warm(FlexLoRA())
    with pytest.raises(ConfigError, match="rank 5, but the global adapter has rank 3"):
        FlexLoRA().plan(state, Site("big", 1, rank=5))


@pytest.mark.parametrize(
    ("table", "where"),
    [
        ({"name": "lora-fair", "ridge": 0}, "ridge"),
        ({"name": "lora-fair", "ridge": -1}, "ridge"),
        ({"name": "lora-fair", "ridge": float("nan")}, "ridge"),
        ({"name": "lora-fair", "ridge": float("inf")}, "ridge"),
        ({"name": "lora-fair", "objective": "cosinus"}, "objective"),
        ({"name": "lora-fair", "objective": "cosine", "ridge": 200.0}, "diverges"),
        ({"name": "flora", "delta-rank": 0}, "delta-rank"),
        ({"name": "hetlora", "gamma": 0}, "gamma"),
        ({"name": "hetlora", "gamma": 1.1}, "gamma"),
        ({"name": "hetlora", "penalty": -0.1}, "penalty"),
        ({"name": "fedrot-lora", "strength": 1.5}, "strength"),
        ({"name": "fedprox", "mu": 0}, "mu"),
        ({"name": "fedprox", "inner": {"name": "flora", "delta-rank": -3}}, "delta-rank"),
        ({"name": "scaffold", "inner": {"name": "flora"}}, "writes the entries anew"),
        ({"name": "scaffold", "inner": {"name": "fedsa-lora"}}, "keeps B"),
        ({"name": "scaffold", "inner": {"name": "hetlora"}}, "gamma = 1"),
        ({"name": "feddyn", "inner": {"name": "fedbuff"}}, "rule of rounds"),
        ({"name": "feddyn", "alpha": 0}, "alpha"),
        ({"name": "fedavgm", "beta": 1.0}, "beta"),
        ({"name": "fedadam", "tau": 0}, "tau"),
        ({"name": "fedyogi", "beta2": 1}, "beta2"),
        ({"name": "fedasync", "alpha": 0}, "alpha"),
        ({"name": "fedasync", "staleness": {"kind": "polynomial", "a": -1}}, "staleness.a"),
        ({"name": "fedasync", "inner": {"name": "flora"}}, "re-draws"),
        ({"name": "fedbuff", "size": 0}, "size"),
        ({"name": "fedbuff", "inner": {"name": "hetlora"}}, "mixes"),
        ({"name": "fedbuff", "inner": {"name": "fedasync"}}, "inner rule is asynchronous"),
        ({"name": "norm-clip", "max-norm": 0}, "max-norm"),
        ({"name": "trimmed-mean", "trim": 0.5}, "trim"),
        ({"name": "krum", "byzantine": 0.5}, "byzantine"),
        ({"name": "multi-krum", "select": 0}, "select"),
        ({"name": "coordinate-median", "inner": {"name": "flora"}}, "one by one"),
        ({"name": "trimmed-mean", "inner": {"name": "norm-clip"}}, "one by one"),
        ({"name": "krum", "inner": {"name": "fedsa-lora"}}, "keep B to themselves"),
        ({"name": "multi-krum", "inner": {"name": "fedsa-lora"}}, "keep B to themselves"),
        ({"name": "central-dp", "noise-multiplier": 0}, "noise-multiplier"),
        ({"name": "central-dp", "delta": 1.0}, "delta"),
        ({"name": "central-dp", "inner": {"name": "flexlora"}}, "one by one"),
        ({"name": "central-dp", "inner": {"name": "krum"}}, "one by one"),
        ({"name": "central-dp", "quantile": 0.5, "expected-sites": 10}, "below twice the noise"),
        ({"name": "fedbuff", "inner": {"name": "exact-mixed-rank"}}, "inner"),
        ({"name": "exact-mixed-rank", "delta-rank": 0}, "delta-rank"),
        ({"name": "flexlora", "beyond-rank": "none"}, "beyond-rank"),
        ({"name": "hetlora", "beyond-rank": "none"}, "beyond-rank"),
        ({"name": "fedavg"}, "fedavg-lora"),
        ({"name": "fedprox", "inner": {"name": "sgd"}}, "fedavg-lora"),
        ({}, "name"),
    ],
)
def test_values_that_cannot_be_run(table: dict[str, object], where: str) -> None:
    with pytest.raises(ValidationError, match=where):
        ANY.validate_python(table)
