"""The replies folded one by one against the naive twins that hold them all."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedft.core.folding import Folded, MeanUpdate, RunningMean, fold
from fedft.core.types import Adapter, ClientUpdate, Factors, Part, factor_name, module_of, part_of
from tests.core.held import held

HEAD = "base_model.model.classifier.weight"
NAMES = [factor_name("layer.0.q", "A"), factor_name("layer.0.q", "B"), factor_name("x", "A"), HEAD]
SHAPES = {"layer.0.q": (24, 20), "layer.1.v": (16, 28)}  # (d_out, d_in)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def adapter(seed: int, rank: int = 3, scale: float = 2.0, *, head: bool = True) -> Adapter:
    return Adapter(
        {
            module: Factors(draw(seed, rank, d_in), draw(seed + 1, d_out, rank), scale)
            for module, (d_out, d_in) in SHAPES.items()
        },
        {HEAD: draw(seed + 2, 5, 7)} if head else {},
    )


def reply(
    k: int, start: Adapter, parts: Sequence[Part] = ("A", "B", "head"), **metrics: float
) -> ClientUpdate:
    moved = {n: t + 0.1 * draw(900 + k, *t.shape) for n, t in start.tensors(parts).items()}
    return ClientUpdate(f"s{k:03}", 1 + k % 7, moved, start, metrics)


# ── means ─────────────────────────────────────────────────────────────────────────────────────


def two_pass(
    replies: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> tuple[dict[str, Tensor], float]:
    """The twin: sum, divide, then the squares of what is left; heads have no squares."""
    means, squares = dict[str, Tensor](), 0.0
    for name in dict.fromkeys(n for tensors in replies for n in tensors):
        own = [(w, t[name].double()) for w, t in zip(weights, replies, strict=True) if name in t]
        mean = sum(w * x for w, x in own) / sum(w for w, _ in own)
        assert isinstance(mean, Tensor)
        means[name] = mean
        if part_of(name) != "head":
            squares += sum(w * float((x - mean).square().sum()) for w, x in own)
    return means, squares


@settings(max_examples=80, deadline=None)
@given(
    sites=st.lists(
        st.tuples(
            st.integers(1, 10**6),
            st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True),
        ),
        min_size=1,
        max_size=12,
    ),
    rows=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_running_mean_and_squares_equal_the_two_pass_twin(
    sites: list[tuple[int, list[str]]], rows: int, dtype: torch.dtype, seed: int
) -> None:
    """Names in any order, any of them missing at any site."""
    replies = [
        {n: draw(seed + 7 * k + NAMES.index(n), rows, 3, dtype=dtype) for n in names}
        for k, (_, names) in enumerate(sites)
    ]
    weights = [w for w, _ in sites]
    running = RunningMean(spread=True)
    for tensors, weight in zip(replies, weights, strict=True):
        running.add(tensors, weight)
    means, squares = two_pass(replies, weights)
    assert list(running.tensors()) == list(means)
    for name, (mean, weight) in running.means().items():
        assert torch.allclose(mean, means[name], rtol=1e-12, atol=1e-14)
        own = [w for w, t in zip(weights, replies, strict=True) if name in t]
        assert weight == sum(own)
        assert running.tensors()[name].dtype == dtype
    assert running.squares == pytest.approx(squares, rel=1e-11, abs=1e-20)


def test_a_common_offset_costs_the_squares_no_digits() -> None:
    """Where sum w x^2 - W x_bar^2 would be left with none."""
    name = NAMES[0]
    replies = [{name: 1e9 + draw(k, 8, 8, dtype=torch.float64)} for k in range(50)]
    running = RunningMean(spread=True)
    for tensors in replies:
        running.add(tensors, 1)
    _, squares = two_pass(replies, [1] * 50)
    assert running.squares == pytest.approx(squares, rel=1e-6)
    raw = sum(float(t[name].square().sum()) for t in replies)
    naive = raw - 50 * float(running.means()[name][0].square().sum())
    assert naive != pytest.approx(squares, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_replies_are_their_mean_bit_for_bit(dtype: torch.dtype) -> None:
    tensors = {name: draw(k, 5, 7, dtype=dtype) for k, name in enumerate(NAMES)}
    running = RunningMean(spread=True)
    for weight in (3, 7, 1, 10**9, 2):
        running.add(tensors, weight)
    mean = running.tensors()
    assert all(torch.equal(mean[n], t) and mean[n].dtype == dtype for n, t in tensors.items())
    assert running.squares == 0.0


def test_the_scale_of_the_weights_changes_no_bit() -> None:
    once, seven = RunningMean(), RunningMean()
    for k in range(9):
        tensors = {name: draw(10 * k + i, 5, 7) for i, name in enumerate(NAMES)}
        once.add(tensors, 1 + k)
        seven.add(tensors, 7 * (1 + k))
    x, y = once.means(), seven.means()
    assert all(torch.equal(x[name][0], y[name][0]) for name in NAMES)


def test_a_tensor_of_mixed_shapes_has_no_mean_and_the_others_have() -> None:
    running = RunningMean()
    for k, rank in enumerate((3, 2, 3)):
        running.add({NAMES[0]: draw(k, rank, 4), HEAD: torch.full((2,), float(k))}, 1)
    assert running.mixed == {NAMES[0]}
    assert set(running.means()) == {HEAD}
    assert running.means()[HEAD][0].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"layer\.0\.q\.lora_A.*shape is not the same"):
        running.tensors()


def test_the_mean_shares_no_memory_with_the_fold() -> None:
    """It is handed to a rule, whose state outlives the round."""
    running = RunningMean()
    running.add({name: draw(k, 5, dtype=torch.float64) for k, name in enumerate(NAMES)}, 1)
    first = running.tensors()
    kept = {name: t.clone() for name, t in first.items()}
    running.add({name: draw(50 + k, 5, dtype=torch.float64) for k, name in enumerate(NAMES)}, 1)
    assert all(torch.equal(first[name], kept[name]) for name in NAMES)
    assert len({t.untyped_storage().data_ptr() for t in first.values()}) == len(NAMES)


# ── the mean update of a layer ────────────────────────────────────────────────────────────────


def dense(x: Factors) -> Tensor:
    return x.scale * x.B.double() @ (x.A.double() if x.R is None else x.R.double() @ x.A.double())


def dense_value(update: MeanUpdate) -> Tensor:
    value = update.value()
    return value if isinstance(value, Tensor) else dense(value)


def folded_update(parts: Sequence[Factors], weights: Sequence[float]) -> MeanUpdate:
    update = MeanUpdate()
    for x, weight in zip(parts, weights, strict=True):
        update.add(x, weight)
    return update


def weighted_mean(parts: Sequence[Factors], weights: Sequence[float]) -> Tensor:
    total = sum(w * dense(x) for w, x in zip(weights, parts, strict=True))
    assert isinstance(total, Tensor)
    return total / sum(weights)


@settings(max_examples=80, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=25),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    common=st.lists(st.sampled_from(["", "A", "B", "AB"]), min_size=25, max_size=25),
    core=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_mean_update_equals_the_dense_sum(
    ranks: list[int],
    shape: tuple[int, int],
    common: list[str],
    core: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Below the dense matrix and above it, whichever factors a site has in common with the last."""
    d_out, d_in = shape
    parts: list[Factors] = []
    for k, (rank, shared) in enumerate(zip(ranks, common, strict=False)):
        rank = parts[-1].rank if parts and shared else rank
        A, B = (
            draw(seed + 3 * k + i, *s, dtype=dtype)
            for i, s in ((0, (rank, d_in)), (1, (d_out, rank)))
        )
        R = draw(seed + 3 * k + 2, rank, rank, dtype=dtype) if core else None
        if parts and "A" in shared:
            A = parts[-1].A.clone()
        if parts and "B" in shared:
            B = parts[-1].B.clone()
        parts.append(Factors(A, B, 16 / rank, R))
    weights = [1 + 5 * k % 11 for k in range(len(parts))]
    update, expected = folded_update(parts, weights), weighted_mean(parts, weights)
    scale = sum(w * dense(x).abs().max() for w, x in zip(weights, parts, strict=True))
    assert float((dense_value(update) - expected).abs().max()) <= 1e-13 * float(scale)
    assert update.weight == sum(weights)
    if sum(x.rank for x in parts) * (d_in + d_out) < d_in * d_out:
        assert isinstance(update.value(), Factors)


@pytest.mark.parametrize("shared", ["A", "B", "core"])
def test_a_factor_that_all_share_keeps_the_rank(shared: str) -> None:
    """FFA-LoRA, RoLoRA and Fed-SB at 100 sites."""
    A, B = draw(0, 3, 20), draw(1, 24, 3)
    parts = [
        {
            "A": Factors(A, draw(10 + k, 24, 3), 2.0),
            "B": Factors(draw(10 + k, 3, 20), B, 2.0),
            "core": Factors(A, B, 2.0, draw(10 + k, 3, 3)),
        }[shared]
        for k in range(100)
    ]
    weights = [1.0 + k for k in range(100)]
    value = folded_update(parts, weights).value()
    assert isinstance(value, Factors)
    assert value.rank == 3
    assert torch.allclose(dense(value), weighted_mean(parts, weights), rtol=1e-12, atol=1e-13)


def test_reading_changes_nothing() -> None:
    parts = [Factors(draw(k, 2, 10), draw(50 + k, 12, 2), 1.0) for k in range(20)]
    read, unread = MeanUpdate(), MeanUpdate()
    for x in parts:
        read.add(x, 2)
        read.value()
        unread.add(x, 2)
    assert torch.equal(dense_value(read), dense_value(unread))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [[1], [3], [8], [1, 4, 9]])
def test_memory_of_a_layer_is_bounded_whatever_the_number_of_sites(
    ranks: list[int], dtype: torch.dtype
) -> None:
    """The dense matrix in float64, and a stack that takes less than it. In bytes."""
    d_out, d_in = 40, 30
    update, grew, most = MeanUpdate(), 0, 0
    for k in range(200):
        rank = ranks[k % len(ranks)]
        # Views of something large, as the tensors of a message are.
        message = torch.randn(100_000, dtype=dtype)
        A = message[: rank * d_in].view(rank, d_in)
        B = message[-rank * d_out :].view(d_out, rank)
        update.add(Factors(A, B, 1.0), 1)
        now = held(update)
        grew, most = grew + (now > most), max(now, most)
        assert now <= 8 * d_out * d_in + dtype.itemsize * d_out * d_in
    assert most > 8 * d_out * d_in  # the yardstick sees both
    assert grew < 100


# ── a round ───────────────────────────────────────────────────────────────────────────────────


def weighted(updates: Sequence[ClientUpdate]) -> list[float]:
    total = sum(u.examples for u in updates)
    return [u.examples / total for u in updates]


def test_memory_of_a_round_does_not_grow_with_the_sites() -> None:
    start = adapter(0)
    folded, sizes = Folded(), list[int]()
    gone = list[weakref.ref[Tensor]]()
    for k in range(300):
        update = reply(k, start, loss=1.0)
        gone += [weakref.ref(t) for t in update.tensors.values()]
        folded.add(update)
        del update
        sizes.append(held(folded))
    numbers = sum(t.numel() for t in start.tensors().values())
    layers = sum(d_out * d_in for d_out, d_in in SHAPES.values())
    # The start and the frame's copy of it, the mean, and every layer's dense matrix and stack.
    assert max(sizes) <= 4 * numbers + 8 * 2 * numbers + (8 + 4) * layers
    assert max(sizes[150:]) <= max(sizes[:150])
    assert all(ref() is None for ref in gone)


def test_sites_without_examples_and_the_order_of_arrival_count_for_nothing() -> None:
    start = adapter(0)
    updates = [reply(k, start, loss=float(k)) for k in range(9)]
    empty = replace(reply(50, start, loss=1e9), examples=0)
    x, y = fold(updates), fold([empty, *reversed(updates)])
    assert x.sites == y.sites == [(u.site, u.examples) for u in updates]
    assert x.examples == y.examples == sum(u.examples for u in updates)
    assert (x.loss, x.moved, x.spread) == (y.loss, y.moved, y.spread)
    a, b = x.mean_update(start).tensors, y.mean_update(start).tensors
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_mean_update_is_a_reply_like_any_other() -> None:
    start = adapter(0)
    updates = [reply(k, start) for k in range(5)]
    mean = fold(updates).mean_update(start)
    assert mean.examples == sum(u.examples for u in updates)
    assert mean.start is start
    assert list(mean.tensors) == list(updates[0].tensors)
    means, _ = two_pass([u.tensors for u in updates], [u.examples for u in updates])
    for name, tensor in mean.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor.double(), means[name], rtol=1e-7, atol=1e-8)
    # Folded alone, it is its own mean.
    again = fold([mean]).mean_update(start)
    assert all(torch.equal(again.tensors[name], t) for name, t in mean.tensors.items())


def test_a_round_without_replies_or_of_mixed_ranks_has_no_mean_update() -> None:
    start = adapter(0)
    with pytest.raises(ValueError, match="no reply"):
        fold([replace(reply(0, start), examples=0)]).mean_update(start)
    with pytest.raises(ValueError, match="shape is not the same"):
        fold([reply(0, start), reply(1, adapter(3, rank=2))]).mean_update(start)


def test_loss_and_dead_start_are_means_over_those_who_report_them() -> None:
    start = adapter(0)
    updates = [
        replace(reply(0, start, loss=1.0), examples=10),
        replace(reply(1, start, loss=3.0, grad_A_norm=1.0, grad_B_norm=4.0), examples=30),
        replace(reply(2, start, grad_A_norm=3.0, grad_B_norm=4.0), examples=10),
        replace(reply(3, start, grad_A_norm=3.0, grad_B_norm=0.0), examples=99),
        replace(reply(4, start, grad_A_norm=float("inf"), grad_B_norm=1.0), examples=99),
    ]
    folded = fold(updates)
    assert folded.loss == pytest.approx((10 * 1 + 30 * 3) / 40)
    assert folded.dead_start == pytest.approx((30 * 0.25 + 10 * 0.75) / 40)
    silent = fold([reply(0, start)])
    assert silent.loss is None
    assert silent.dead_start is None


@settings(max_examples=60, deadline=None)
@given(
    sites=st.lists(
        st.tuples(
            st.sampled_from([("A",), ("B",), ("A", "B"), ("A", "head"), ("head",)]),
            st.integers(0, 2),
            st.sampled_from([None, "layer.0.q", "layer.1.v"]),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_factors_that_stayed_behind_are_those_of_the_start(
    sites: list[tuple[tuple[Part, ...], int, str | None]],
) -> None:
    """Each site with its own parts, version of the start, and layers: the twin holds all adapters."""
    starts = [adapter(10 * version) for version in range(3)]
    updates: list[ClientUpdate] = []
    for k, (parts, version, only) in enumerate(sites):
        update = reply(k, starts[version], parts)
        if only is not None:
            sent = {n: t for n, t in update.tensors.items() if n == HEAD or module_of(n) == only}
            update = replace(update, tensors=sent)
        updates.append(update)
    folded, p = fold(updates), weighted(updates)

    expected: dict[str, Tensor] = {}
    for module in SHAPES:
        own = [
            (w, u)
            for w, u in zip(p, updates, strict=True)
            if any(n != HEAD and module_of(n) == module for n in u.tensors)
        ]
        for part in ("A", "B"):
            name = factor_name(module, part)
            if own:
                total = sum(w * u.adapter.tensors()[name].double() for w, u in own)
                assert isinstance(total, Tensor)
                expected[name] = total / sum(w for w, _ in own)
        updated = dict(folded.mean_updates()).get(module)
        assert (updated is None) == (not own)
        if updated is not None:
            found = updated if isinstance(updated, Tensor) else dense(updated)
            products = [u.adapter.factors[module] for _, u in own]
            assert torch.allclose(
                found, weighted_mean(products, [w for w, _ in own]), rtol=1e-10, atol=1e-12
            )
    means = folded.mean_factors()
    assert list(means) == list(expected)
    for name, mean in means.items():
        assert mean is not None
        assert torch.allclose(mean, expected[name], rtol=1e-12, atol=1e-14)

    sent = [{n: t for n, t in u.tensors.items() if n != HEAD} for u in updates]
    if not any(sent):
        assert folded.moved is None
        assert folded.spread is None
        return
    moved = sum(
        w
        * sum(
            float((t.double() - u.start.tensors()[n].double()).square().sum()) for n, t in s.items()
        )
        for w, u, s in zip(p, updates, sent, strict=True)
    )
    assert folded.moved == pytest.approx(moved, rel=1e-12)
    assert folded.spread == pytest.approx(two_pass(sent, p)[1], rel=1e-10, abs=1e-15)


def test_what_stays_at_the_sites_is_not_guessed() -> None:
    """FedSA-LoRA: B is personal. What the server holds under that name means nothing."""
    start = adapter(0)
    folded = fold([reply(k, start, ("A",)) for k in range(3)], {"B", "head"})
    assert folded.hidden == {"B"}
    assert dict(folded.mean_updates()) == {}
    assert set(folded.mean_factors()) == set(start.tensors(("A",)))
    assert folded.moved is not None


def test_mixed_ranks_keep_their_mean_update_alone() -> None:
    updates = [reply(k, adapter(10 * k, rank), ("A", "B")) for k, rank in enumerate((1, 2, 3, 2))]
    folded = fold(updates)
    for module, found in folded.mean_updates():
        parts = [u.adapter.factors[module] for u in updates]
        expected = weighted_mean(parts, [u.examples for u in updates])
        assert isinstance(found, Factors)
        assert torch.allclose(dense(found), expected, rtol=1e-12, atol=1e-13)
    assert set(folded.mean_factors().values()) == {None}
    assert folded.spread is None
    assert folded.moved is not None


@settings(max_examples=40, deadline=None)
@given(
    sites=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([None, "layer.0.q", "layer.1.v"])),
        min_size=1,
        max_size=9,
    )
)
def test_starts_are_those_of_the_sites_that_sent_the_layer(
    sites: list[tuple[int, str | None]],
) -> None:
    """Each distinct one once, with the share of its sites: the twin holds all updates."""
    starts = [adapter(10 * version, rank) for version, rank in enumerate((3, 1, 2))]
    updates: list[ClientUpdate] = []
    for k, (version, only) in enumerate(sites):
        update = reply(k, starts[version])
        if only is not None:
            sent = {n: t for n, t in update.tensors.items() if n == HEAD or module_of(n) == only}
            update = replace(update, tensors=sent)
        updates.append(update)
    found = fold(updates).starts()
    for module in SHAPES:
        own = [u for u in updates if any(n != HEAD and module_of(n) == module for n in u.tensors)]
        assert (module in found) == bool(own)
        if own:
            expected = weighted_mean(
                [u.start.factors[module] for u in own], [u.examples for u in own]
            )
            total = sum(share * dense(x) for x, share in found[module])
            assert isinstance(total, Tensor)
            assert torch.allclose(total, expected, rtol=1e-12, atol=1e-13)
            assert sum(share for _, share in found[module]) == pytest.approx(1.0)
    assert fold(updates, {"B"}).starts() == {}
