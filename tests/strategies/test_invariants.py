"""What each rule promises beyond the common laws, beside dense and naive twins."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedft.core import algebra, meters
from fedft.core.folding import fold
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    Factors,
    LocalTraining,
    ServerState,
    Site,
    part_of,
)
from fedft.strategies import (
    FedAdam,
    FedAvgLoRA,
    FedAvgM,
    FedExLoRA,
    FedMomentum,
    FedProx,
    FedSALoRA,
    FedSB,
    FedSVD,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    LoRAFAIR,
    RaFLoRA,
    RoLoRA,
)
from fedft.strategies.fedex_lora import residual
from fedft.strategies.hetlora import tail

SHAPES = {"a.q": (24, 18), "b.v": (16, 30)}  # (d_out, d_in)
HEAD = "base_model.model.score.weight"


def draw(g: torch.Generator, *shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def adapter(seed=0, rank=4, scale=2.0, dtype=torch.float64, shapes=SHAPES) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    factors = {
        m: Factors(draw(g, rank, n, dtype=dtype), draw(g, o, rank, dtype=dtype), scale)
        for m, (o, n) in shapes.items()
    }
    return Adapter(factors, {HEAD: draw(g, 3, 5, dtype=dtype)})


def near(start: Adapter, seed: int, size=0.3, parts=("A", "B", "head")) -> ClientUpdate:
    """A site that moved the given parts."""
    g = torch.Generator().manual_seed(100 + seed)
    moved = {
        n: t + size * draw(g, *t.shape, dtype=t.dtype) for n, t in start.tensors(parts).items()
    }
    return ClientUpdate(f"s{seed}", 5 + 3 * seed, moved, start)


def cohort(start: Adapter, count=5, **kwargs) -> list[ClientUpdate]:
    return [near(start, k, **kwargs) for k in range(count)]


def combine(rule, updates, start=None, **state) -> ServerState:
    return rule.aggregate(ServerState(start or updates[0].start, **state), updates)


def ideal(updates, module) -> Tensor:
    total = sum(u.examples for u in updates)
    return sum(u.examples / total * u.adapter.factors[module].product().double() for u in updates)


def asked_for(updates, state, module) -> Tensor:
    """What the server had, plus the mean of the changes that sites made to what they were sent."""
    total = sum(u.examples for u in updates)
    changes = [
        u.adapter.factors[module].product() - u.start.factors[module].product() for u in updates
    ]
    mean = sum(u.examples / total * x for u, x in zip(updates, changes, strict=True))
    return state.adapter.factors[module].product() + mean


def applied(state, module) -> Tensor:
    change = state.adapter.factors[module].product().double()
    return change + state.delta[module].product().double() if module in state.delta else change


def bias(updates, after, before=None) -> float:
    measured = meters.measure(before or ServerState(updates[0].start), fold(updates), after)
    value = measured["bias"]["relative"]
    assert value is not None
    return value


def gap(x, y) -> float:
    return float((x - y).norm() / y.norm())


def with_factor(update: ClientUpdate, part: str, source: Adapter) -> ClientUpdate:
    """The same reply with one factor taken from elsewhere."""
    tensors = {
        n: source.tensors()[n] if part_of(n) == part else t for n, t in update.tensors.items()
    }
    return replace(update, tensors=tensors)


# ── FedAvg-LoRA (T1) ──────────────────────────────────────────────────────────────────────────


class TestFedAvgLoRA:
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_equal_sites_come_back_bit_for_bit(self, count):
        update = near(adapter(dtype=torch.float32), 1)
        updates = [replace(update, site=f"s{k}", examples=1 + k) for k in range(count)]
        after = combine(FedAvgLoRA(), updates)
        assert all(torch.equal(after.adapter.tensors()[n], t) for n, t in update.tensors.items())

    @pytest.mark.parametrize("part", ["A", "B"])
    def test_no_bias_where_one_factor_is_common(self, part):
        start = adapter()
        updates = [with_factor(u, part, start) for u in cohort(start)]
        assert bias(updates, combine(FedAvgLoRA(), updates)) < 1e-14
        assert bias(cohort(start), combine(FedAvgLoRA(), cohort(start))) > 0.01

    def test_the_bias_is_the_covariance_of_the_factors(self):
        """E = sum_k p_k (B_k - B)(A_k - A), and in pairs (methods.md, A1 and A2)."""
        updates = cohort(adapter())
        after = combine(FedAvgLoRA(), updates)
        p = [u.examples / sum(v.examples for v in updates) for u in updates]
        for module in SHAPES:
            parts = [u.adapter.factors[module] for u in updates]
            mean = after.adapter.factors[module]
            E = ideal(updates, module) - mean.product()
            single = sum(w * (x.B - mean.B) @ (x.A - mean.A) for w, x in zip(p, parts, strict=True))
            pairs = sum(
                v * w * (x.B - y.B) @ (x.A - y.A) / 2
                for v, x in zip(p, parts, strict=True)
                for w, y in zip(p, parts, strict=True)
            )
            assert gap(mean.scale * single, E) < 1e-12
            assert gap(mean.scale * pairs, E) < 1e-12

    def test_a_million_examples_beside_one(self):
        updates = cohort(adapter(dtype=torch.float32), 2)
        updates = [replace(updates[0], examples=1), replace(updates[1], examples=10**6)]
        after = combine(FedAvgLoRA(), updates).adapter.tensors()
        for name, tensor in updates[1].tensors.items():
            expected = tensor.double() + (updates[0].tensors[name].double() - tensor) / (10**6 + 1)
            assert torch.equal(after[name], expected.float())


# ── FFA-LoRA (T2) ─────────────────────────────────────────────────────────────────────────────


class TestFFALoRA:
    def test_A_stays_and_never_travels(self):
        rule, state = FFALoRA(), ServerState(adapter())
        for _ in range(3):
            plan = rule.plan(state, Site("s", 1))
            assert not any(
                part_of(n) == "A" for n in [*plan.sent(), *plan.start.tensors(plan.receive)]
            )
            state = rule.aggregate(state, cohort(state.adapter, parts=plan.send))
            for module, f in adapter().factors.items():
                assert torch.equal(state.adapter.factors[module].A, f.A)

    @pytest.mark.parametrize("c", [2.0, 5.0])
    def test_alpha_and_learning_rate_are_one_knob_for_sgd(self, c):
        """(c alpha, lr) and (alpha, c^2 lr) give the same function, step by step (T2.4)."""
        g = torch.Generator().manual_seed(0)
        A, X, Y = draw(g, 2, 6), draw(g, 6, 9), draw(g, 5, 9)

        def train(scale: float, lr: float) -> Tensor:
            B = torch.zeros(5, 2, dtype=torch.float64)
            for _ in range(20):
                error = scale * B @ A @ X - Y
                B = B - lr * scale * error @ (A @ X).T
            return scale * B @ A

        assert gap(train(c, 1e-3), train(1.0, c * c * 1e-3)) < 1e-12

    def test_noise_enters_once(self):
        """E ||(B + x) A - B A||^2 = sigma^2 m ||A||^2, and what both factors would add (T2.5)."""
        g = torch.Generator().manual_seed(0)
        (m, n), r, sigma, draws = (7, 6), 3, 0.5, 20000
        A, B = draw(g, r, n), draw(g, m, r)
        x_B, x_A = sigma * draw(g, draws, m, r), sigma * draw(g, draws, r, n)
        once = (x_B @ A).square().sum(dim=(1, 2)).mean()
        assert float(once) == pytest.approx(float(sigma**2 * m * A.square().sum()), rel=0.02)
        both = ((B + x_B) @ (A + x_A) - B @ A).square().sum(dim=(1, 2)).mean()
        expected = sigma**2 * (m * A.square().sum() + n * B.square().sum()) + sigma**4 * m * n * r
        assert float(both) == pytest.approx(float(expected), rel=0.02)


# ── LoRA-FAIR (T3) ────────────────────────────────────────────────────────────────────────────


def corrections(updates, **settings) -> dict[str, Tensor]:
    """dB by layer."""
    plain = combine(FedAvgLoRA(), updates).adapter.factors
    fair = combine(LoRAFAIR(**settings), updates).adapter.factors
    return {m: fair[m].B - plain[m].B for m in plain}


class TestLoRAFAIR:
    RIDGES = (1e-6, 1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3)

    def test_the_closed_form_solves_the_dense_problem(self):
        """Naive twin: gradient of ||dW - (B + dB) A||^2 + lambda ||dB||^2, formed in full."""
        updates = cohort(adapter())
        plain, dB = combine(FedAvgLoRA(), updates).adapter.factors, corrections(updates, ridge=0.1)
        for module, f in plain.items():
            dW = ideal(updates, module) / f.scale
            strength = 0.1 * float((f.A @ f.A.T).trace()) / f.rank
            gradient = 2 * (((f.B + dB[module]) @ f.A - dW) @ f.A.T + strength * dB[module])
            assert gradient.norm() < 1e-11 * (dW @ f.A.T).norm()

    def test_limits_and_monotony_in_the_ridge(self):
        """T3.1, T3.3, T3.4: more ridge, more bias, less correction; in the limit FedAvg-LoRA."""
        updates = cohort(adapter())
        plain = bias(updates, combine(FedAvgLoRA(), updates))
        errors = [bias(updates, combine(LoRAFAIR(ridge=x), updates)) for x in self.RIDGES]
        sizes = [[corrections(updates, ridge=x)[m].norm() for x in self.RIDGES] for m in SHAPES]
        assert errors == sorted(errors)
        assert all(error <= plain for error in errors)
        assert all(size == sorted(size, reverse=True) for size in sizes)
        assert bias(updates, combine(LoRAFAIR(ridge=1e12), updates)) == pytest.approx(plain)
        far = combine(LoRAFAIR(ridge=1e12), updates).adapter.tensors()
        near_ = combine(FedAvgLoRA(), updates).adapter.tensors()
        assert all(torch.allclose(far[n], near_[n], rtol=1e-9) for n in near_)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"objective": "cosine", "steps": 50},
            {"objective": "cosine", "cosine_dim": "column", "steps": 50},
        ],
        ids=["ridge", "whole", "column"],
    )
    def test_no_correction_where_all_A_agree(self, settings):
        """T3.2. (Column-wise cosines have their optimum elsewhere only if columns disagree.)"""
        start = adapter()
        updates = [with_factor(u, "A", start) for u in cohort(start)]
        for dB in corrections(updates, **settings).values():
            assert dB.norm() < 1e-12

    def test_no_B_reaches_outside_the_row_space_of_A(self):
        """T3.5: the floor is ||dW (I - P)||, P = A^+ A, and a vanishing ridge gets there."""
        updates = cohort(adapter())
        after = combine(LoRAFAIR(ridge=1e-10), updates).adapter.factors
        for module, f in after.items():
            dW = ideal(updates, module)
            floor = (dW - dW @ torch.linalg.pinv(f.A) @ f.A).norm()
            assert float((dW - f.product()).norm()) == pytest.approx(float(floor), rel=1e-8)
            for ridge in self.RIDGES:
                g = combine(LoRAFAIR(ridge=ridge), updates).adapter.factors[module]
                assert (dW - g.product()).norm() >= floor * (1 - 1e-12)

    def test_the_base_never_moves(self):
        assert not combine(LoRAFAIR(), cohort(adapter())).delta

    @pytest.mark.parametrize("dim", ["whole", "column"])
    @pytest.mark.parametrize("count", [3, 9])  # 9 * 4 columns: wider than d_out
    def test_the_descent_is_the_dense_one(self, dim, count):
        """Naive twin: automatic differentiation through products formed in full."""
        updates = cohort(adapter(), count)
        settings = {"objective": "cosine", "cosine_dim": dim, "steps": 30, "step_size": 0.3}
        dB = corrections(updates, ridge=0.05, **settings)
        plain = combine(FedAvgLoRA(), updates).adapter.factors
        for module, f in plain.items():
            dW = ideal(updates, module)
            twin = torch.zeros_like(f.B, requires_grad=True)
            for _ in range(30):
                product = (f.B + twin) @ f.A
                if dim == "whole":
                    similarity = torch.cosine_similarity(dW.flatten(), product.flatten(), dim=0)
                else:
                    similarity = torch.cosine_similarity(dW, product, dim=0).mean()
                (1 - similarity + 0.05 * twin.square().sum()).backward()
                assert twin.grad is not None
                twin = (twin - 0.3 * twin.grad).detach().requires_grad_()
            assert gap(dB[module], twin.detach()) < 1e-10
            assert dB[module].norm() > 1e-4

    @pytest.mark.parametrize("dim", ["whole", "column"])
    def test_sites_that_cancel_each_other_give_no_direction(self, dim):
        """dW is zero up to rounding; its cosine with anything is noise."""
        one, other = cohort(adapter(), 2)
        opposite = {n: -t if ".lora_B." in n else t for n, t in one.tensors.items()}
        updates = [one, replace(other, examples=one.examples, tensors=opposite)]
        for dB in corrections(updates, objective="cosine", cosine_dim=dim, steps=50).values():
            assert dB.norm() < 1e-6

    @pytest.mark.parametrize("dim", ["whole", "column"])
    def test_the_descent_does_not_lose(self, dim):
        """T3.3 for the cosine: the objective at dB is no larger than at zero."""
        updates = cohort(adapter())
        plain = combine(FedAvgLoRA(), updates).adapter.factors
        dB = corrections(updates, objective="cosine", cosine_dim=dim, steps=200)
        for module, f in plain.items():
            dW = ideal(updates, module)

            def loss(d, f=f, dW=dW):
                product = (f.B + d) @ f.A
                pair = (dW, product) if dim == "column" else (dW.flatten(), product.flatten())
                similarity = torch.cosine_similarity(*pair, dim=0).mean()
                return float(1 - similarity + 0.01 * d.square().sum())

            assert loss(dB[module]) < loss(torch.zeros_like(f.B))

    @pytest.mark.parametrize("objective", ["frobenius-ridge", "cosine"])
    def test_an_update_of_zero_stays_zero(self, objective):
        start = adapter()
        zero = {n: torch.zeros_like(t) for n, t in start.tensors().items()}
        updates = [replace(u, tensors=zero) for u in cohort(start)]
        after = combine(LoRAFAIR(objective=objective, steps=5), updates)
        assert all(not t.any() for t in after.adapter.tensors().values())


# ── rules in product space ────────────────────────────────────────────────────────────────────


def mixed(rule, state: ServerState, ranks=(4, 1, 2, 4, 2)) -> list[ClientUpdate]:
    return [
        near(rule.plan(state, Site(f"s{k}", 1, rank=rank)).start, k) for k, rank in enumerate(ranks)
    ]


class TestFLoRA:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_exact_for_any_ranks_over_rounds(self, dtype):
        """The base change is the sum of all mean updates, and its rank never passes min(d)."""
        rule, state = FLoRA(), ServerState(adapter(dtype=dtype))
        total = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()}
        for t in range(1, 5):
            updates = mixed(rule, state)
            total = {m: total[m] + ideal(updates, m) for m in SHAPES}
            state = rule.aggregate(state, updates)
            for module, f in state.delta.items():
                assert f.rank == min(*SHAPES[module], 13 * t)
                assert gap(f.product(), total[module]) < (1e-6 if dtype == torch.float32 else 1e-13)

    def test_weights_on_one_factor_only(self):
        """Weighting both would square them: the trap of the method."""
        updates = cohort(adapter(), 2)
        f = combine(FLoRA(), updates).delta["a.q"]
        assert torch.equal(f.B[:, :4], updates[0].adapter.factors["a.q"].B)

    def test_the_cap_keeps_the_best(self):
        updates = cohort(adapter())
        after = combine(FLoRA(delta_rank=3), updates)
        for module in SHAPES:
            dW = ideal(updates, module)
            floor = float(torch.linalg.svdvals(dW)[3:].norm())
            assert after.delta[module].rank == 3
            assert float((dW - after.delta[module].product()).norm()) == pytest.approx(floor)

    def test_fresh_factors_are_new_every_round_and_reproducible(self):
        rule = FLoRA(seed=5)
        one = combine(rule, cohort(adapter()))
        two = rule.aggregate(one, cohort(one.adapter))
        again = combine(FLoRA(seed=5), cohort(adapter()))
        other = combine(FLoRA(seed=6), cohort(adapter()))
        A = one.adapter.factors["a.q"].A
        assert torch.equal(A, again.adapter.factors["a.q"].A)
        assert not torch.equal(A, two.adapter.factors["a.q"].A)
        assert not torch.equal(A, other.adapter.factors["a.q"].A)
        assert float(A.abs().max()) <= 1 / math.sqrt(18)
        assert float(A.std()) == pytest.approx(1 / math.sqrt(3 * 18), rel=0.2)


class TestFlexLoRA:
    def test_the_error_is_the_tail_of_the_spectrum(self):
        rule = FlexLoRA()
        updates = mixed(rule, ServerState(adapter()))
        after = combine(rule, updates, adapter())
        for module, f in after.adapter.factors.items():
            dW = ideal(updates, module)
            values = torch.linalg.svdvals(dW)
            error = float((dW - f.product()).norm())
            assert error == pytest.approx(float(values[4:].norm()), rel=1e-10)
            assert torch.allclose(f.A @ f.A.T, torch.eye(4, dtype=torch.float64), atol=1e-12)
            for rank in (1, 2, 3):  # every site's start is the best of its rank
                start = rule.plan(after, Site("s", 1, rank=rank)).start.factors[module]
                error = float((dW - start.product()).norm())
                assert error == pytest.approx(float(values[rank:].norm()), rel=1e-10)
                assert start.scale == pytest.approx(2.0 * 4 / rank)

    def test_exact_where_the_rank_suffices(self):
        """Two sites of rank 2 fit into rank 4; completed, a lone one does."""
        for rule, ranks in ((FlexLoRA(), (2, 2)), (FlexLoRA(beyond_rank="server"), (2,))):
            state = ServerState(adapter())
            updates = mixed(rule, state, ranks=ranks)
            after = combine(rule, updates, adapter())
            for module, f in after.adapter.factors.items():
                forgets = rule.beyond_rank == "zero"
                dW = ideal(updates, module) if forgets else asked_for(updates, state, module)
                assert gap(f.product(), dW) < 1e-12
        assert bias(updates, after, state) < 1e-12

    def test_idle_directions_can_learn(self):
        """One site of rank 1 leaves three rows without a singular value: B zero, A orthonormal."""
        rule = FlexLoRA()
        updates = mixed(rule, ServerState(adapter()), ranks=(1,))
        for f in combine(rule, updates, adapter()).adapter.factors.values():
            assert not f.B[:, 1:].any()
            assert torch.allclose(f.A @ f.A.T, torch.eye(4, dtype=torch.float64), atol=1e-12)


class TestHetLoRA:
    def test_equal_ranks_and_norms_are_fedavg(self):
        """Norms are made equal by scaling B; numbers of examples are equal too."""
        start = adapter()
        updates = []
        for u in cohort(start):
            f = {m: replace(x, B=x.B / algebra.norm(x)) for m, x in u.adapter.factors.items()}
            updates.append(replace(u, examples=7, tensors=Adapter(f, u.adapter.head).tensors()))
        het, plain = (combine(rule, updates) for rule in (HetLoRA(gamma=1.0), FedAvgLoRA()))
        for name, tensor in plain.adapter.tensors().items():
            assert torch.allclose(het.adapter.tensors()[name], tensor, atol=1e-13)

    def test_padding_adds_no_norm_and_scale_is_common(self):
        rule, state = HetLoRA(), ServerState(adapter())
        updates = mixed(rule, state)
        assert {f.scale for u in updates for f in u.start.factors.values()} == {2.0}
        for u in updates:
            for f in u.adapter.factors.values():
                assert algebra.norm(algebra.pad(f, 4)) == pytest.approx(algebra.norm(f))

    def test_a_rank_of_one_holder_shrinks_by_its_weight(self):
        """The published weakness, kept on purpose: see raFLoRA."""
        rule, state = HetLoRA(gamma=1.0), ServerState(adapter())
        updates = [
            near(rule.plan(state, Site(f"s{k}", 1, rank=r)).start, k, size=0.0)
            for k, r in enumerate((4, 2, 2))
        ]
        after = rule.aggregate(state, updates)
        for module, f in after.adapter.factors.items():
            norms = [algebra.norm(u.adapter.factors[module]) for u in updates]
            w = norms[0] / sum(norms)
            assert torch.allclose(f.A[2:], w * state.adapter.factors[module].A[2:])
            assert torch.allclose(f.A[:2], state.adapter.factors[module].A[:2])

    def test_plan_asks_for_the_tail_penalty(self):
        rule = HetLoRA(gamma=0.75, penalty=0.2)
        training = rule.plan(ServerState(adapter()), Site("s", 1)).training
        assert training == LocalTraining(tail_penalty=0.2, tail_keep=0.75)
        configured = LocalTraining(lr=0.3, epochs=4, proximal_mu=0.1)
        assert configured.overlaid(training) == replace(
            configured, tail_penalty=0.2, tail_keep=0.75
        )

    @pytest.mark.parametrize("rule", [HetLoRA(gamma=1.0), HetLoRA(gamma=0.5, min_rank=4)])
    def test_no_penalty_where_nothing_can_be_pruned(self, rule):
        assert rule.plan(ServerState(adapter()), Site("s", 1)).training == LocalTraining()

    def test_ranks_fall_step_by_step_to_the_least(self):
        rule, state = HetLoRA(gamma=0.5, min_rank=2), ServerState(adapter())
        ranks = []
        for _ in range(4):
            start = rule.plan(state, Site("s", 1)).start
            ranks.append(start.rank)
            smaller = {n: 0.9 * t for n, t in start.tensors().items()}
            state = rule.aggregate(state, [ClientUpdate("s", 1, smaller, start)])
        assert ranks == [4, 2, 2, 2]

    def test_the_tail_is_summed_over_the_layers(self):
        x = adapter()
        expected = sum(float(f.B[:, 3:].norm() * f.A[3:].norm()) for f in x.factors.values())
        assert tail(x, 3) == pytest.approx(expected)
        assert tail(x, 4) == 0


class TestRaFLoRA:
    def test_one_rank_is_flexlora(self):
        updates = cohort(adapter())
        ra, flex = (combine(rule, updates).adapter.factors for rule in (RaFLoRA(), FlexLoRA()))
        for module in SHAPES:
            assert gap(ra[module].product(), flex[module].product()) < 1e-12

    def test_against_the_blocks_of_the_paper(self):
        """Naive twin: blocks between the fleet's levels, summed densely."""
        rule, state = RaFLoRA(), ServerState(adapter())
        updates = mixed(rule, state)
        after = rule.aggregate(state, updates)
        for module in SHAPES:
            total = torch.zeros(SHAPES[module], dtype=torch.float64)
            for low, high in ((0, 1), (1, 2), (2, 4)):
                able = [u for u in updates if u.start.rank >= high]
                count = sum(u.examples for u in able)
                for u in able:
                    f = u.adapter.factors[module]
                    block = f.B[:, low:high] @ f.A[low:high]
                    total += u.examples / count * f.scale * block
            U, S, Vt = torch.linalg.svd(total)
            best = (U[:, :4] * S[:4]) @ Vt[:4]
            assert gap(after.adapter.factors[module].product(), best) < 1e-11

    def test_rare_ranks_do_not_collapse(self):
        """Sites that change nothing leave the global update as it is, whoever takes part."""
        rule = RaFLoRA()
        state = combine(FlexLoRA(), cohort(adapter()))
        before = {m: f.product() for m, f in state.adapter.factors.items()}
        for ranks in ((4, 1, 1), (1, 1), (2, 1), (4, 2, 1)):
            updates = [
                near(rule.plan(state, Site(f"s{k}", 1, rank=r)).start, k, size=0.0)
                for k, r in enumerate(ranks)
            ]
            state = rule.aggregate(state, updates)
        for module, f in state.adapter.factors.items():
            assert gap(f.product(), before[module]) < 1e-10


class TestFedExLoRA:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_base_plus_factors_is_the_mean_update(self, dtype):
        updates = cohort(adapter(dtype=dtype))
        after = combine(FedExLoRA(), updates)
        for module in SHAPES:
            exact = 1e-6 if dtype == torch.float32 else 1e-14
            assert gap(applied(after, module), ideal(updates, module)) < exact

    def test_the_residual_has_K_minus_one_blocks(self):
        from fedft.strategies.base import layers

        updates = cohort(adapter(), 3)
        plain = combine(FedAvgLoRA(), updates).adapter.factors
        for layer in layers(updates):
            E = residual(layer)
            assert E.rank == 2 * 4
            naive = ideal(updates, layer.module) - plain[layer.module].product()
            assert gap(E.product(), naive) < 1e-13

    def test_one_site_leaves_the_base_alone(self):
        assert not combine(FedExLoRA(), cohort(adapter(), 1)).delta


class TestFedMomentum:
    def test_split_is_exact_and_keeps_the_best(self):
        rule, state = FedMomentum(), ServerState(adapter())
        updates = mixed(rule, state)
        after = rule.aggregate(state, updates)
        for module, f in after.adapter.factors.items():
            dW = asked_for(updates, state, module)
            values = torch.linalg.svdvals(dW)
            assert gap(applied(after, module), dW) < 1e-13
            assert algebra.norm(f) == pytest.approx(float(values[:4].norm()), rel=1e-11)
            # Half of the spectrum on each factor: what A and B have in common is S.
            assert torch.allclose(f.A @ f.A.T, f.B.T @ f.B, atol=1e-10)
            sent, lacking = 4 + 1 + 2 + 4 + 2, 4 - 1
            assert after.delta[module].rank == min(sent + lacking, *SHAPES[module]) - 4

    def test_low_rank_updates_leave_no_residual(self):
        """What one site of low rank learns fits, from nothing or beside what the server has."""
        rule, start = FedMomentum(), adapter()
        empty = start.map_factors({m: replace(f, B=0 * f.B) for m, f in start.factors.items()})
        for before, ranks in ((empty, (1,)), (start, (2,))):
            state = ServerState(before)
            updates = mixed(rule, state, ranks=ranks)
            after = rule.aggregate(state, updates)
            assert not after.delta
            for module, f in after.adapter.factors.items():
                assert gap(f.product(), asked_for(updates, state, module)) < 1e-13
                if before is empty:
                    assert float(f.A[3].norm()) == pytest.approx(1.0)  # idle, and able to learn


@pytest.mark.parametrize("rule", [FLoRA(), FedExLoRA(), FedMomentum()], ids=lambda r: r.name)
def test_exact_in_float32_long_after_the_base_change_is_full(rule):
    """Twenty rounds; the change reaches its full rank in the first few."""
    start = adapter(dtype=torch.float32)
    state = ServerState(
        start.map_factors({m: replace(f, B=0 * f.B) for m, f in start.factors.items()})
    )
    for t in range(20):
        updates = [
            near(rule.plan(state, Site("s", 1)).start, 10 * t + k, size=0.03) for k in range(6)
        ]
        after = rule.aggregate(state, updates)
        assert bias(updates, after, state) < 1e-6
        state = after
    assert all(f.rank == min(f.shape) for f in state.delta.values())


# ── rules that freeze or hide (FedRot-LoRA has a file of its own) ─────────────────────────────────


class TestRoLoRA:
    def test_the_frozen_factor_is_the_same_bytes(self):
        rule, state = RoLoRA(), ServerState(adapter())
        for t in range(4):
            plan = rule.plan(state, Site("s", 1))
            frozen = "A" if t % 2 == 0 else "B"
            after = rule.aggregate(state, cohort(plan.start, parts=plan.send))
            for name, tensor in state.adapter.tensors({frozen}).items():
                assert torch.equal(after.adapter.tensors()[name], tensor)
            state = after


class TestFedSALoRA:
    @pytest.mark.parametrize("head", ["local", "shared"])
    def test_B_is_never_on_the_wire(self, head):
        rule = FedSALoRA(head=head)
        plan = rule.plan(ServerState(adapter()), Site("s", 1))
        travels = {part_of(n) for n in [*plan.sent(), *plan.start.tensors(plan.receive)]}
        assert travels == ({"A"} if head == "local" else {"A", "head"})
        assert plan.train >= {"A", "B", "head"}
        assert plan.keep == rule.personal == {"B", "head"} - travels


class TestFedSVD:
    def test_the_function_does_not_change(self):
        updates = cohort(adapter(), parts=("B", "head"))
        plain = combine(FFALoRA(), updates).adapter.factors
        after = combine(FedSVD(), updates).adapter.factors
        for module, f in after.items():
            assert gap(f.product(), plain[module].product()) < 1e-13
            assert torch.allclose(f.A @ f.A.T, torch.eye(4, dtype=torch.float64), atol=1e-12)
            gram = f.B.T @ f.B
            assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-9)


class TestFedSB:
    def test_only_the_core_travels_from_a_seeded_basis(self):
        rule = FedSB(basis="seeded", seed=3)
        state = rule.init(adapter())
        plan = rule.plan(state, Site("s", 1))
        assert {part_of(n) for n in plan.start.tensors(plan.receive)} == {"R", "head"}
        for module, f in plan.start.factors.items():
            assert plan.basis is not None
            A, B = algebra.orthonormal_basis(plan.basis, module, f.shape, f.rank, torch.float64)
            assert torch.equal(A, f.A)
            assert torch.equal(B, f.B)
            assert f.R is not None
            assert not f.R.any()
        after = rule.aggregate(state, cohort(plan.start, parts=("R", "head")))
        for module, f in after.adapter.factors.items():
            assert torch.equal(f.A, state.adapter.factors[module].A)
            assert torch.equal(f.B, state.adapter.factors[module].B)

    def test_the_first_round_gives_the_best_basis_of_its_rank(self):
        updates = cohort(adapter())
        after = combine(FedSB(), updates)
        for module, f in after.adapter.factors.items():
            dW = ideal(updates, module)
            floor = float(torch.linalg.svdvals(dW)[4:].norm())
            assert float((dW - f.product()).norm()) == pytest.approx(floor, rel=1e-10)
            for basis in (f.A @ f.A.T, f.B.T @ f.B):
                assert torch.allclose(basis, torch.eye(4, dtype=torch.float64), atol=1e-12)

    def test_cores_average_without_bias(self):
        state = combine(FedSB(), cohort(adapter()))
        updates = cohort(state.adapter, parts=("R", "head"))
        assert bias(updates, FedSB().aggregate(state, updates), state) < 1e-13


# ── combinators ───────────────────────────────────────────────────────────────────────────────


class TestCombinators:
    def test_fedprox_changes_nothing_but_the_loss(self):
        inner = HetLoRA(gamma=0.5)
        rule, state = FedProx(mu=0.3, inner=inner), ServerState(adapter())
        x, y = rule.plan(state, Site("s", 1)), inner.plan(state, Site("s", 1))
        assert x.training == replace(y.training, proximal_mu=0.3)
        assert (x.start, x.receive, x.train, x.send, x.keep) == (
            y.start,
            y.receive,
            y.train,
            y.send,
            y.keep,
        )
        updates = cohort(adapter())
        a, b = combine(rule, updates), combine(inner, updates)
        assert all(torch.equal(t, b.adapter.tensors()[n]) for n, t in a.adapter.tensors().items())

    def test_plain_steps_are_the_inner_rule(self):
        updates = cohort(adapter())
        for inner in (FedAvgLoRA(), LoRAFAIR(), FLoRA(), FlexLoRA(), FedSB()):
            x = combine(FedAvgM(lr=1.0, beta=0.0, inner=inner), updates)
            y = combine(inner, updates)
            for name, tensor in y.adapter.tensors().items():
                assert torch.allclose(x.adapter.tensors()[name], tensor, atol=1e-13)
            assert all(gap(f.product(), y.delta[m].product()) == 0 for m, f in x.delta.items())

    @pytest.mark.parametrize("rule", [FedAvgM(inner=RoLoRA()), FedAdam(inner=RoLoRA())])
    def test_momentum_does_not_move_what_is_frozen(self, rule):
        state = ServerState(adapter())
        for t in range(4):
            plan = rule.plan(state, Site("s", 1))
            after = rule.aggregate(state, cohort(plan.start, parts=plan.send))
            frozen = "A" if t % 2 == 0 else "B"
            for name, tensor in state.adapter.tensors({frozen}).items():
                assert torch.equal(after.adapter.tensors()[name], tensor)
            state = after

    @pytest.mark.parametrize("inner", [FLoRA(), FlexLoRA(), FedSVD(), FedMomentum(), RaFLoRA()])
    def test_only_the_head_is_stepped_where_the_basis_changes(self, inner):
        updates = cohort(adapter())
        stepped, plain = combine(FedAdam(inner=inner), updates), combine(inner, updates)
        for module, f in plain.adapter.factors.items():
            assert torch.equal(stepped.adapter.factors[module].product(), f.product())
        assert not torch.equal(stepped.adapter.head[HEAD], plain.adapter.head[HEAD])
        assert set(stepped.slots) == {f"fedadam/{x}/{HEAD}" for x in "mv"}

    def test_moments_are_float64_and_cross_the_round_boundary(self):
        rule, start = FedAdam(), adapter(dtype=torch.float32)
        one = combine(rule, cohort(start))
        assert all(t.dtype == torch.float64 for t in one.slots.values())
        two = rule.aggregate(one, cohort(one.adapter))
        forgot = rule.aggregate(replace(one, slots={}), cohort(one.adapter))
        name = next(iter(two.adapter.tensors()))
        assert not torch.equal(two.adapter.tensors()[name], forgot.adapter.tensors()[name])

    def test_slots_of_the_inner_rule_are_kept(self):
        start = adapter()
        smaller = {n: 0.9 * t for n, t in start.tensors().items()}
        rule = FedAvgM(inner=HetLoRA(gamma=0.5))
        after = rule.aggregate(ServerState(start), [ClientUpdate("s", 1, smaller, start)])
        assert rule.plan(after, Site("s", 1)).start.rank == 2
        assert any(name.startswith("fedavgm/m/") for name in after.slots)
