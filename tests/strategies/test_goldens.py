"""One round of every rule, computed by hand.

One layer "m" of shape 2 x 2, two sites with 1 and 3 examples, so p = (1/4, 3/4). Unless said
otherwise r = 1, s = 1 and

    A_1 = [1 0]    B_1 = [4 0]^T    B_1 A_1 = diag(4, 0)
    A_2 = [0 1]    B_2 = [0 4]^T    B_2 A_2 = diag(0, 4)

    dW = 1/4 diag(4, 0) + 3/4 diag(0, 4) = diag(1, 3)
    A = [1/4 3/4]    B = [1 3]^T    B A = [1/4 3/4; 3/4 9/4]
    E = dW - B A = [3/4 -3/4; -3/4 3/4]
"""

from math import exp, sqrt

import pytest
import torch
from torch import Tensor

from fedft.core.parts import factor_name
from fedft.core.terms import Dynamic
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    Factors,
    LocalTraining,
    Part,
    ServerState,
    Site,
    TrainPlan,
)
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
    Krum,
    LoRAFAIR,
    MultiKrum,
    NormClip,
    RaFLoRA,
    RoLoRA,
    RunFacts,
    Scaffold,
    TrimmedMean,
)
from fedft.strategies.asynchronous import Staleness
from fedft.strategies.drift import added, sent_down

EVERYTHING: frozenset[Part] = frozenset({"A", "B", "R", "head"})
BIAS = "base_model.model.head.bias"


def matrix(rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def adapter(A, B, scale=1.0, R=None, head=()) -> Adapter:
    core = None if R is None else matrix(R)
    return Adapter({"m": Factors(matrix(A), matrix(B), scale, core)}, dict(head))


START = adapter([[1, 1]], [[0], [0]])
SITES = [(adapter([[1, 0]], [[4], [0]]), 1), (adapter([[0, 1]], [[0], [4]]), 3)]


def play(rule, start=START, sites=SITES, state=None, parts=EVERYTHING):
    """One round in which the sites return the given adapters."""
    state = rule.init(start) if state is None else state
    updates = [
        ClientUpdate(f"site-{k}", n, end.tensors(parts), end if end.rank != start.rank else start)
        for k, (end, n) in enumerate(sites, 1)
    ]
    return rule.aggregate(state, updates)


def check(state: ServerState, A, B, delta=None) -> None:
    f = state.adapter.factors["m"]
    assert torch.allclose(f.A, matrix(A), atol=1e-12), f.A
    assert torch.allclose(f.B, matrix(B), atol=1e-12), f.B
    if delta is None:
        assert not state.delta
    else:
        assert torch.allclose(state.delta["m"].product(), matrix(delta), atol=1e-12)


def test_fedavg_lora():
    check(play(FedAvgLoRA()), [[0.25, 0.75]], [[1], [3]])


def test_ffa_lora():
    # A stays [1 1]; B = 1/4 [4 0] + 3/4 [0 4].
    check(play(FFALoRA(), parts={"B"}), [[1, 1]], [[1], [3]])


class TestLoRAFAIR:
    def test_frobenius_ridge(self):
        # A A^T = 1/16 + 9/16 = 5/8; lambda = 1 * 5/8; E A^T = [-3/8 3/8]^T.
        # dB = [-3/8 3/8] / (5/4) = [-0.3 0.3].
        check(play(LoRAFAIR(ridge=1.0)), [[0.25, 0.75]], [[0.7], [3.3]])

    def test_one_step_on_the_cosine(self):
        # X = B = [1 3]; T = dW A^T = [1/4 9/4]; ||dW|| = sqrt(10); ||X A|| = sqrt(10 * 5/8) = 5/2.
        # cos = (1/4 + 27/4) / (5/2 sqrt(10)) = 2.8 / sqrt(10).
        # gradient of cos = T / (5/2 sqrt(10)) - cos * 5/8 X / (25/4)
        #                 = ([0.1 0.9] - 0.28 [1 3]) / sqrt(10) = [-0.18 0.06] / sqrt(10).
        rule = LoRAFAIR(objective="cosine", ridge=0.5, steps=1, step_size=1.0)
        expected = [[1 - 0.18 / sqrt(10)], [3 + 0.06 / sqrt(10)]]
        check(play(rule), [[0.25, 0.75]], expected)

    def test_one_step_on_the_mean_cosine_of_the_columns(self):
        # Column 1 of dW points to e1, column 2 to e2; both columns of X A point to X / sqrt(10).
        # gradient 1: (e1 - 1/10 [1 3]) / sqrt(10) = [0.9 -0.3] / sqrt(10)
        # gradient 2: (e2 - 3/10 [1 3]) / sqrt(10) = [-0.3 0.1] / sqrt(10);  mean [0.3 -0.1] / sqrt(10)
        rule = LoRAFAIR(objective="cosine", cosine_dim="column", ridge=0.5, steps=1, step_size=1.0)
        expected = [[1 + 0.3 / sqrt(10)], [3 - 0.1 / sqrt(10)]]
        check(play(rule), [[0.25, 0.75]], expected)

    def test_the_second_step_feels_the_penalty(self):
        # After one step dB = d = [-0.18 0.06] / sqrt(10); with the cosine's own pull p at X + d,
        # step 2 adds p - 2 * ridge * d. With ridge 0.25 and 0.5 the results differ by 0.5 d.
        def B(ridge):
            rule = LoRAFAIR(objective="cosine", ridge=ridge, steps=2, step_size=1.0)
            return play(rule).adapter.factors["m"].B

        d = matrix([[-0.18], [0.06]]) / sqrt(10)
        assert torch.allclose(B(0.25) - B(0.5), 0.5 * d, atol=1e-12)


class TestFLoRA:
    def test_the_stack_goes_into_the_base(self):
        state = play(FLoRA())
        f = state.adapter.factors["m"]
        assert torch.equal(state.delta["m"].A, matrix([[0.25, 0], [0, 0.75]]))
        assert torch.equal(state.delta["m"].B, matrix([[4, 0], [0, 4]]))
        assert not f.B.any()
        assert (f.A.abs() <= 1 / sqrt(2)).all()
        assert not torch.equal(f.A, START.factors["m"].A)

    def test_ranks_and_scales_are_folded(self):
        # R = 2 with s = 1, so a site of rank 1 trains with s = 2: 1/4 * 2 * diag(4, 0) = diag(2, 0).
        # The other: 3/4 * diag(4, 8).
        start = adapter([[1, 0], [0, 1]], [[0, 0], [0, 0]])
        small = adapter([[1, 0]], [[4], [0]], scale=2.0)
        large = adapter([[1, 0], [0, 1]], [[4, 0], [0, 8]])
        state = play(FLoRA(), start, [(small, 1), (large, 3)])
        assert torch.allclose(state.delta["m"].product(), matrix([[5, 0], [0, 6]]))


class TestFlexLoRA:
    def test_the_leading_triplet(self):
        # diag(1, 3) = 3 e2 e2^T + 1 e1 e1^T.
        check(play(FlexLoRA()), [[0, 1]], [[0], [3]])

    def test_every_rank_gets_its_own(self):
        # R = 2, s = 1: A = [e2; e1], B = [3 e2, 1 e1]. Rank 1 trains with s = 2, so B is halved.
        rule = FlexLoRA()
        start = adapter([[1, 0], [0, 1]], [[0, 0], [0, 0]])
        small = adapter([[1, 0]], [[2], [0]], scale=2.0)  # diag(4, 0)
        large = adapter([[0, 1], [1, 0]], [[0, 0], [4, 0]])  # diag(0, 4)
        state = play(rule, start, [(small, 1), (large, 3)])
        check(state, [[0, 1], [1, 0]], [[0, 1], [3, 0]])
        f = rule.plan(state, Site("s", 1, rank=1)).start.factors["m"]
        assert (f.A.tolist(), f.B.tolist(), f.scale) == ([[0, 1]], [[0], [1.5]], 2.0)

    def test_beyond_a_rank_as_the_server_has_it(self):
        # The server has diag(0, 2) beyond rank 1, s = 1. Site 1: 2 * diag(2, 0) + diag(0, 2).
        # dW = 1/4 diag(4, 2) + 3/4 diag(0, 4) = diag(1, 3.5).
        rule = FlexLoRA(beyond_rank="server")
        start = adapter([[1, 0], [0, 1]], [[6, 0], [0, 2]])
        small = adapter([[1, 0]], [[2], [0]], scale=2.0)
        large = adapter([[0, 1], [1, 0]], [[0, 0], [4, 0]])
        state = play(rule, start, [(small, 1), (large, 3)])
        check(state, [[0, 1], [1, 0]], [[0, 1], [3.5, 0]])


class TestHetLoRA:
    def test_padding_with_what_the_server_has(self):
        # As below, but site 1 is padded with the server's second row [0 1] and column [0 5].
        # A = 3/4 [1 0; 0 1] + 1/4 [0 0; 0 1]; B = 3/4 [3 0; 0 5] + 1/4 [0 0; 0 1].
        start = adapter([[1, 0], [0, 1]], [[0, 0], [0, 5]])
        small = adapter([[1, 0]], [[3], [0]])
        large = adapter([[0, 0], [0, 1]], [[0, 0], [0, 1]])
        state = play(HetLoRA(gamma=1.0, beyond_rank="server"), start, [(small, 1), (large, 3)])
        check(state, [[0.75, 0], [0, 1]], [[2.25, 0], [0, 4]])

    def test_padding_and_sparsity_weights(self):
        # R = 2. Site 1, rank 1: B A = diag(3, 0), norm 3. Site 2, rank 2: diag(0, 1), norm 1.
        # w = (3/4, 1/4), whatever the numbers of examples. A = 3/4 [1 0; 0 0] + 1/4 [0 0; 0 1].
        start = adapter([[1, 0], [0, 1]], [[0, 0], [0, 0]])
        small = adapter([[1, 0]], [[3], [0]])
        large = adapter([[0, 0], [0, 1]], [[0, 0], [0, 1]])
        state = play(HetLoRA(), start, [(small, 1), (large, 3)])
        check(state, [[0.75, 0], [0, 0.25]], [[2.25, 0], [0, 0.25]])

    def test_pruning(self):
        # gamma = 1/2 of rank 2 keeps 1. The tail ||B[:, 1]|| ||A[1]|| falls from 4 * 1 to 3 * 1, so
        # the second column goes, and the site continues at rank 1.
        rule = HetLoRA(gamma=0.5)
        start = adapter([[1, 0], [0, 1]], [[4, 0], [0, 4]])
        end = adapter([[1, 0], [0, 1]], [[5, 0], [0, 3]])
        state = play(rule, start, [(end, 1)])
        check(state, [[1, 0], [0, 0]], [[5, 0], [0, 0]])
        assert rule.plan(state, Site("site-1", 1)).start.rank == 1
        assert rule.plan(state, Site("site-2", 1)).start.rank == 2

    def test_a_tail_that_grew_is_kept(self):
        rule = HetLoRA(gamma=0.5)
        start = adapter([[1, 0], [0, 1]], [[4, 0], [0, 4]])
        end = adapter([[1, 0], [0, 1]], [[5, 0], [0, 4.5]])
        state = play(rule, start, [(end, 1)])
        check(state, [[1, 0], [0, 1]], [[5, 0], [0, 4.5]])
        assert not state.slots


class TestRaFLoRA:
    START = adapter([[1, 0], [0, 1]], [[0, 0], [0, 9]])

    def test_each_rank_over_those_who_have_it(self):
        # R = 2, s = 1; site 1 of rank 1 with s = 2: 2 * diag(4, 0). Site 2: diag(2, 4).
        # Rank 1: 1/4 * diag(8, 0) + 3/4 * diag(2, 0) = diag(3.5, 0). Rank 2: site 2 alone, diag(0, 4).
        small = adapter([[1, 0]], [[4], [0]], scale=2.0)
        large = adapter([[1, 0], [0, 1]], [[2, 0], [0, 4]])
        state = play(RaFLoRA(), self.START, [(small, 1), (large, 3)])
        check(state, [[0, 1], [1, 0]], [[0, 3.5], [4, 0]])

    def test_a_rank_that_nobody_holds_is_kept(self):
        # Rank 1 becomes 2 * diag(4, 0); rank 2 stays the server's diag(0, 9).
        small = adapter([[1, 0]], [[4], [0]], scale=2.0)
        state = play(RaFLoRA(), self.START, [(small, 1)])
        check(state, [[0, 1], [1, 0]], [[0, 8], [9, 0]])


def test_fedex_lora():
    check(play(FedExLoRA()), [[0.25, 0.75]], [[1], [3]], delta=[[0.75, -0.75], [-0.75, 0.75]])


def test_fedex_lora_adds_up_over_rounds():
    rule = FedExLoRA()
    state = play(rule, state=play(rule))
    check(state, [[0.25, 0.75]], [[1], [3]], delta=[[1.5, -1.5], [-1.5, 1.5]])


def test_rolora():
    # Round 1 averages B over A = [1 1], round 2 averages A over that B.
    rule = RoLoRA()
    assert rule.plan(rule.init(START), Site("s", 1)).train == {"B", "head"}
    state = play(rule, parts={"B"})
    check(state, [[1, 1]], [[1], [3]])
    assert rule.plan(state, Site("s", 1)).train == {"A", "head"}
    state = play(rule, state=state, parts={"A"})
    check(state, [[0.25, 0.75]], [[1], [3]])
    assert rule.plan(state, Site("s", 1)).train == {"B", "head"}


def test_fedsa_lora():
    rule = FedSALoRA()
    state = play(rule, parts={"A"})
    check(state, [[0.25, 0.75]], [[0], [0]])
    plan = rule.plan(state, Site("s", 1))
    assert (plan.send, plan.keep) == ({"A"}, {"B", "head"})


def test_fedsvd():
    # B A = [1 3]^T [1 1] = U S V^T with u = [1 3] / sqrt(10), v = [1 1] / sqrt(2), S = sqrt(20).
    state = play(FedSVD(), parts={"B"})
    check(state, [[sqrt(0.5), sqrt(0.5)]], [[sqrt(2)], [3 * sqrt(2)]])


def test_fedmomentum():
    # diag(1, 3): the 3 stays, half of it on each factor; the 1 goes into the base.
    state = play(FedMomentum())
    check(state, [[0, sqrt(3)]], [[0], [sqrt(3)]], delta=[[1, 0], [0, 0]])


class TestExactMixedRank:
    # R = 2, s = 1, d = 3. The server has diag(9, 4, 0), and D = diag(0, 0, 7) in the base.
    START = adapter([[3, 0, 0], [0, 2, 0]], [[3, 0], [0, 2], [0, 0]])
    BASE = Factors(matrix([[0, 0, 1]]), matrix([[0], [0], [7]]), 1.0)

    def test_what_a_site_cannot_train_is_in_its_base(self):
        state = ServerState(self.START, delta={"m": self.BASE})
        plan = ExactMixedRank().plan(state, Site("s", 1, rank=1))
        f = plan.start.factors["m"]
        # Rank 1 trains with s = 2, so B is halved: 2 * 3/2 * 3 = 9.
        assert (f.A.tolist(), f.B.tolist(), f.scale) == ([[3, 0, 0]], [[1.5], [0], [0]], 2.0)
        assert torch.equal(plan.delta["m"].product(), matrix([[0, 0, 0], [0, 4, 0], [0, 0, 7]]))
        assert ExactMixedRank().plan(state, Site("s", 1, rank=2)).delta is state.delta

    def test_changes_are_averaged_and_the_rest_is_merged(self):
        # Site 1, rank 1, 1 example: 9 became 2 * 1/2 * 5 = 5 and 1 appeared beside it, in row 3: the
        # change is (-4, 0, +1) in column 1. Site 2, rank 2, 3 examples: diag(9, 0, 0), a change of -4
        # in the middle.
        # dW = diag(9, 4, 0) + 1/4 (-4, 0, 1) in column 1 + 3/4 diag(0, -4, 0) = [8 0 0; 0 1 0; 1/4 0 0]
        # of rank 2: column 1 has the norm sqrt(64 + 1/16), column 2 the norm 1.
        small = adapter([[1, 0, 0]], [[2.5], [0], [0.5]], scale=2.0)
        large = adapter([[3, 0, 0], [0, 2, 0]], [[3, 0], [0, 0], [0, 0]])
        state = play(ExactMixedRank(), self.START, [(small, 1), (large, 3)])
        f = state.adapter.factors["m"]
        assert torch.allclose(f.product(), matrix([[8, 0, 0], [0, 1, 0], [0.25, 0, 0]]))
        root = (64 + 1 / 16) ** 0.25
        assert torch.allclose(f.A, matrix([[root, 0, 0], [0, 1, 0]]))
        # Everything fits into rank 2, and nothing is left for the base.
        assert not state.delta or float(state.delta["m"].product().abs().max()) < 1e-12

    def test_what_does_not_fit_goes_into_the_base(self):
        # Site 2 turns its second direction to the third axis: diag(9, 0, 8), a change of -4 and +8.
        # dW = diag(9 - 1, 4 - 3, 6) = diag(8, 1, 6), with site 1 at 5: the 8 and the 6 are kept.
        small = adapter([[1, 0, 0]], [[2.5], [0], [0]], scale=2.0)
        large = adapter([[3, 0, 0], [0, 0, 2]], [[3, 0], [0, 0], [0, 4]])
        state = play(ExactMixedRank(), self.START, [(small, 1), (large, 3)])
        a, b = 8**0.5, 6**0.5
        base = [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
        check(state, [[a, 0, 0], [0, 0, b]], [[a, 0], [0, 0], [0, b]], delta=base)


def test_fed_sb():
    # Round 1: diag(1, 3) at rank 1 is e2 3 e2^T. Round 2: R = 1/4 * 2 + 3/4 * 6 = 5.
    rule = FedSB()
    state = play(rule)
    check(state, [[0, 1]], [[0], [1]])
    assert matrix([[3]]) == state.adapter.factors["m"].R
    cores = [(adapter([[0, 1]], [[0], [1]], R=[[r]]), n) for r, n in ((2, 1), (6, 3))]
    state = play(rule, state.adapter, cores, state, parts={"R"})
    check(state, [[0, 1]], [[0], [1]])
    assert matrix([[5]]) == state.adapter.factors["m"].R


def test_fedprox():
    rule = FedProx(mu=0.5)
    plan = rule.plan(rule.init(START), Site("s", 1))
    assert plan.training == LocalTraining(proximal_mu=0.5)
    check(play(rule), [[0.25, 0.75]], [[1], [3]])


class TestServerOptimizers:
    """On one number x, the head's bias, with x = 0 and sites that return a mean of 1, then 2."""

    @staticmethod
    def values(rule, rounds=2):
        state = rule.init(adapter([[1, 1]], [[0], [0]], head={BIAS: matrix([0.0])}.items()))
        seen = []
        for t in range(1, rounds + 1):
            update = ClientUpdate("s", 1, {BIAS: matrix([float(t)])}, state.adapter)
            state = rule.aggregate(state, [update])
            seen.append(float(state.adapter.head[BIAS]))
        return seen

    def test_fedavgm(self):
        # D = 1: m = 1, x = 1. D = 2 - 1: m = 0.9 + 1, x = 1 + 1.9.
        assert self.values(FedAvgM()) == pytest.approx([1.0, 2.9])

    def test_fedadam(self):
        # v0 = 0.01. m = 0.1, v = 0.99 * 0.01 + 0.01 = 0.0199; x = 0.1 * 0.1 / (sqrt(0.0199) + 0.1).
        rule = FedAdam(lr=0.1, tau=0.1)
        assert self.values(rule, 1) == pytest.approx([0.01 / (sqrt(0.0199) + 0.1)])

    def test_fedyogi(self):
        # v0 = 0.01 < D^2 = 1, so v = 0.01 + 0.01 * 1 = 0.02.
        rule = FedYogi(lr=0.1, tau=0.1)
        x = 0.01 / (sqrt(0.02) + 0.1)
        # D = 2 - x, m = 0.09 + 0.1 D, v = 0.02 + 0.01 D^2.
        D = 2 - x
        step = 0.1 * (0.09 + 0.1 * D) / (sqrt(0.02 + 0.01 * D * D) + 0.1)
        assert self.values(rule) == pytest.approx([x, x + step])


class TestNormClip:
    def test_a_fixed_bound(self):
        # Changes: site 1 has dA = [0 -1], dB = [4 0], of norm sqrt(17); site 2 the same norm.
        # C = sqrt(17) / 2 halves both: A_1 = [1 1/2], B_1 = [2 0], A_2 = [1/2 1], B_2 = [0 2].
        check(play(NormClip(max_norm=sqrt(17) / 2)), [[0.625, 0.875]], [[0.5], [1.5]])

    def test_the_median_of_the_round(self):
        # Norms 1, 2 and 8 in B alone: C = 2 takes the last to a quarter.
        sites = [(adapter([[1, 1]], [[x], [0]]), 1) for x in (1, 2, 8)]
        check(play(NormClip(), sites=sites), [[1, 1]], [[5 / 3], [0]])

    def test_sites_that_stay_where_they_are_have_no_say(self):
        # Norms 0, 0, 0, 0, 1, 2 and 8: C = 2 again, over those that moved. B = (1 + 2 + 2) / 7.
        sites = [(adapter([[1, 1]], [[x], [0]]), 1) for x in (0, 0, 0, 0, 1, 2, 8)]
        check(play(NormClip(), sites=sites), [[1, 1]], [[5 / 7], [0]])
        # One alone moves, and is its own median. Of nobody there is none.
        check(play(NormClip(), sites=sites[:5]), [[1, 1]], [[1 / 5], [0]])
        check(play(NormClip(), sites=sites[:4]), [[1, 1]], [[0], [0]])


FIVE = [
    (adapter([[x, 1]], [[y], [0]]), 1)
    for x, y in zip((0, 1, 2, 3, 99), (7, 5, 6, 4, -99), strict=True)
]


class TestCoordinatewise:
    def test_median_of_an_odd_number(self):
        # Entry by entry: A of 0 1 2 3 99 is 2; B of -99 4 5 6 7 is 5, from another site.
        check(play(CoordinateMedian(), sites=FIVE), [[2, 1]], [[5], [0]])

    def test_median_of_an_even_number(self):
        check(play(CoordinateMedian(), sites=FIVE[:4]), [[1.5, 1]], [[5.5], [0]])

    def test_trimmed_mean(self):
        # k = ceil(0.2 * 5) = 1: A of 1 2 3 is 2, B of 4 5 6 is 5.
        check(play(TrimmedMean(trim=0.2), sites=FIVE), [[2, 1]], [[5], [0]])
        # k = ceil(0.3 * 5) = 2 leaves the median; of two sites nothing can be trimmed.
        check(play(TrimmedMean(trim=0.3), sites=FIVE), [[2, 1]], [[5], [0]])
        check(play(TrimmedMean(trim=0.3), sites=FIVE[:2]), [[0.5, 1]], [[6], [0]])

    def test_a_step_of_the_inner_rule_on_the_median(self):
        # FedAvgM from m = 0 with lr 0.5 goes half of the way from [1 1], [0 0] to the median.
        rule = CoordinateMedian(inner=FedAvgM(lr=0.5))
        check(play(rule, sites=FIVE), [[1.5, 1]], [[2.5], [0]])


class TestKrum:
    # Products diag(x, 0) with x = 0 1 3 4 -20; K = 5, f = 1: two neighbours each.
    # Scores: 1 + 9 = 10, 1 + 4 = 5, 1 + 4 = 5, 1 + 9 = 10, 400 + 441. The second is first.
    # The sites' factors say otherwise: site 2 has them scaled by 10 and 1/10.
    SITES = [
        (adapter([[a, 0]], [[b], [0]]), n)
        for (a, b), n in zip(
            ((1, 0), (10, 0.1), (1, 3), (1, 4), (1, -20)), (1, 1, 3, 1, 1), strict=True
        )
    ]

    def test_krum_takes_one(self):
        check(play(Krum(), sites=self.SITES), [[10, 0]], [[0.1], [0]])

    def test_multi_krum_averages_equally(self):
        # m = K - f = 4: all but the liar, and site 3's examples do not count.
        check(play(MultiKrum(), sites=self.SITES), [[13 / 4, 0]], [[7.1 / 4], [0]])
        check(play(MultiKrum(select=2), sites=self.SITES), [[5.5, 0]], [[1.55], [0]])

    def test_the_head_counts(self):
        sites = [
            (adapter([[1, 0]], [[0], [0]], head={BIAS: matrix([x])}), 1) for x in (0.0, 1.0, 5.0)
        ]
        start = adapter([[1, 0]], [[0], [0]], head={BIAS: matrix([0.0])})
        # One neighbour each: scores 1, 1, 16.
        state = play(Krum(), start, sites)
        assert torch.equal(state.adapter.head[BIAS], matrix([0.0]))


def ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.float64)


class TestCentralDP:
    # Over ffa-lora, so that B is all that is sent. Changes [4 0] and [0 4], of norm 4.
    RULE = CentralDP(noise_multiplier=0.5, clip=2.0, expected_sites=4)

    @staticmethod
    def updates(parts: set[Part]) -> list[ClientUpdate]:
        return [
            ClientUpdate(f"site-{k}", n, end.tensors(parts), START)
            for k, (end, n) in enumerate(SITES, 1)
        ]

    def test_clipped_summed_noised_divided(self):
        # [2 0] + [0 2] + 0.5 * 2 * [1 1], over the four that were expected, not the two that came.
        state = self.RULE.release(ServerState(START, round=1), self.updates({"B"}), ones)
        check(state, [[1, 1]], [[0.75], [0.75]])

    def test_an_empty_round_is_noise(self):
        check(self.RULE.release(ServerState(START, round=1), [], ones), [[1, 1]], [[0.25], [0.25]])

    def test_both_factors_are_one_vector(self):
        # Site 1 moved by dA = [0 -1], dB = [4 0], norm sqrt(17); C = sqrt(17) / 2 halves both sites.
        rule = CentralDP(clip=sqrt(17) / 2, expected_sites=2, inner=FedAvgLoRA())
        state = rule.release(ServerState(START, round=1), self.updates({"A", "B"}), torch.zeros)
        check(state, [[0.75, 0.75]], [[1], [1]])

    def test_the_bound_follows_the_quantile(self):
        # Both are above C = 2: b = (-1/2 - 1/2 + 0.5 * 1) / 4 + 1/2 = 3/8; C <- 2 exp(-0.2 (3/8 - 1/2)).
        # z_D = (0.5^-2 - 1)^(-1/2) = 1 / sqrt(3), so B = [2 2] / 4 + 2 / sqrt(3) / 4.
        table = {"quantile": 0.5, "clip_lr": 0.2, "count_noise": 0.5}
        rule = self.RULE.model_copy(update=table)
        state = rule.release(ServerState(START, round=1), self.updates({"B"}), ones)
        entry = 0.5 + 0.5 / sqrt(3)
        check(state, [[1, 1]], [[entry], [entry]])
        assert rule.bound(state) == pytest.approx(2 * exp(0.2 / 8))
        assert rule.bound(ServerState(START)) == 2.0


class TestStaleness:
    @pytest.mark.parametrize(
        ("staleness", "weights"),
        [
            (Staleness(kind="constant"), [1, 1, 1, 1]),
            (Staleness(kind="polynomial", a=0.5), [1, 1 / sqrt(2), 1 / sqrt(3), 1 / 2]),
            (Staleness(kind="hinge", a=10, b=1), [1, 1, 1 / 11, 1 / 21]),
        ],
    )
    def test_weights(self, staleness, weights):
        assert [staleness.weight(tau) for tau in range(4)] == pytest.approx(weights, rel=1e-15)

    def test_fedasync_mixes_the_model(self):
        # tau = 3: s = 1/2, alpha s = 0.3, whatever the site started from.
        # A = 0.7 [1 1] + 0.3 [1 0]; B = 0.3 [4 0].
        end, n = SITES[0]
        u = ClientUpdate("site-1", n, end.tensors(), adapter([[9, 9]], [[9], [9]]), staleness=3)
        state = FedAsync(alpha=0.6).aggregate(ServerState(START, round=3), [u])
        check(state, [[1, 0.7]], [[1.2], [0]])

    def test_fedbuff_adds_the_change(self):
        # Site 2 is 3 updates late: s = 1/2. It moved A by [0 1] - [2 0] and B by [0 4] - [0 2], so
        # y'_2: A = [1 1] + 1/2 [-2 1] = [0 1.5], B = [0 1]. Site 1 is fresh: A = [1 0], B = [4 0].
        # A = 1/4 [1 0] + 3/4 [0 1.5]; B = 1/4 [4 0] + 3/4 [0 1].
        (fresh, n), (late, m) = SITES
        then = adapter([[2, 0]], [[0], [2]])
        updates = [
            ClientUpdate("site-1", n, fresh.tensors(), START),
            ClientUpdate("site-2", m, late.tensors(), then, staleness=3),
        ]
        state = FedBuff(size=2).aggregate(ServerState(START, round=3), updates)
        check(state, [[0.25, 1.125]], [[1], [0.75]])

    @pytest.mark.parametrize("inner", [FedAvgLoRA(), LoRAFAIR(), FedExLoRA(), FedRotLoRA()])
    def test_with_nothing_stale_fedbuff_is_the_inner_rule(self, inner):
        """Bit for bit: the synchronous round of K sites."""
        mine, its = play(FedBuff(size=2, inner=inner)), play(inner)
        assert all(
            torch.equal(t, its.adapter.tensors()[n]) for n, t in mine.adapter.tensors().items()
        )
        for module, f in its.delta.items():
            assert torch.equal(f.product(), mine.delta[module].product())


# ── rules that correct what clients do ────────────────────────────────────────────────────────

A_NAME, B_NAME = factor_name("m", "A"), factor_name("m", "B")


def replies(*records: dict[str, dict[str, Tensor]]) -> list[ClientUpdate]:
    return [
        ClientUpdate(f"site-{k}", n, end.tensors(EVERYTHING), START, records=own)
        for k, ((end, n), own) in enumerate(zip(SITES, records, strict=True), 1)
    ]


class TestScaffold:
    """N = 4 clients, of whom the two take part. Both weigh 1/2, whatever their examples."""

    rule = Scaffold().of_run(RunFacts(clients=4))
    changes = (
        {"control-change": {A_NAME: matrix([[4, 0]]), B_NAME: matrix([[8], [0]])}},
        {"control-change": {A_NAME: matrix([[0, 2]]), B_NAME: matrix([[0], [-4]])}},
    )

    def test_one_round(self):
        # x = 1/2 (site 1 + site 2); c = 0 + 1/4 (sum of the changes).
        after = self.rule.aggregate(self.rule.init(START), replies(*self.changes))
        check(after, [[0.5, 0.5]], [[2], [2]])
        c = after.record("scaffold-control")
        assert torch.equal(c[A_NAME], matrix([[1, 0.5]]))
        assert torch.equal(c[B_NAME], matrix([[2], [-1]]))

    def test_the_next_plan_brings_c_down_and_the_round_adds_to_it(self):
        state = self.rule.aggregate(self.rule.init(START), replies(*self.changes))
        plan = self.rule.plan(state, Site("site-3", 5))
        assert torch.equal(plan.records["control"][B_NAME], matrix([[2], [-1]]))
        again = self.rule.aggregate(state, replies(*self.changes))
        assert torch.equal(again.record("scaffold-control")[A_NAME], matrix([[2, 1]]))

    def test_a_gradient_is_told_in_the_coordinates_of_a_rank(self):
        # R = 2, r = 1: s_r = 2 s and B_r = B / 2, so that a gradient of B counts twice there.
        whole = adapter([[1, 0], [0, 1]], [[2, 0], [0, 2]])
        own = adapter([[1, 0]], [[1], [0]], scale=2.0)
        plan = TrainPlan(own)
        record = {A_NAME: matrix([[1, 2], [3, 4]]), B_NAME: matrix([[5, 6], [7, 8]])}
        down = sent_down(record, object(), plan, whole)
        assert torch.equal(down[A_NAME], matrix([[1, 2]]))
        assert torch.equal(down[B_NAME], matrix([[10], [14]]))
        up = added({}, down, own, whole, 0.5)
        assert torch.equal(up[A_NAME], matrix([[0.5, 1], [0, 0]]))
        assert torch.equal(up[B_NAME], matrix([[2.5, 0], [3.5, 0]]))


def test_feddyn():
    # N = 4, alpha = 1/2. Changes from START: A [0 -1] and [-1 0], B [4 0]^T and [0 4]^T.
    # h = - 1/2 1/4 (sum of the changes): A [1/8 1/8], B [-1/2 -1/2]^T.
    # x = mean - h / alpha: A [1/2 1/2] - [1/4 1/4], B [2 2]^T + [1 1]^T.
    rule = FedDyn(alpha=0.5).of_run(RunFacts(clients=4))
    after = rule.aggregate(rule.init(START), replies({}, {}))
    check(after, [[0.25, 0.25]], [[3], [3]])
    assert torch.equal(after.record("feddyn-h")[A_NAME], matrix([[0.125, 0.125]]))
    assert torch.equal(after.record("feddyn-h")[B_NAME], matrix([[-0.5], [-0.5]]))
    plan = rule.plan(after, Site("site-1", 1))
    assert plan.terms == (Dynamic(alpha=0.5),)


def test_fednova():
    # ||a|| = 2 and 6, p = 1/4 and 3/4: tau = 1/2 + 9/2 = 5.
    # A: [1 1] + 5 (1/4 [0 -1] / 2 + 3/4 [-1 0] / 6) = [1 1] - [5/8 5/8]
    # B: 5 (1/4 [4 0] / 2 + 3/4 [0 4] / 6) = [5/2 5/2]
    rule = FedNova()
    counted = [{"effective-steps": {"a": torch.tensor(a)}} for a in (2.0, 6.0)]
    after = rule.aggregate(rule.init(START), replies(*counted))
    check(after, [[0.375, 0.375]], [[2.5], [2.5]])


def test_fednova_with_equal_steps_is_the_inner_rule():
    counted = [{"effective-steps": {"a": torch.tensor(3.7)}}] * 2
    after = FedNova().aggregate(FedNova().init(START), replies(*counted))
    plain = play(FedAvgLoRA())
    assert torch.equal(after.adapter.factors["m"].B, plain.adapter.factors["m"].B)


def test_rules_draw_from_the_run_seed_unless_they_have_their_own():
    def drawn(rule: FLoRA) -> Tensor:
        return play(rule).adapter.factors["m"].A

    seven = RunFacts(seed=7)
    assert torch.equal(drawn(FLoRA().of_run(seven)), drawn(FLoRA(seed=7)))
    assert torch.equal(drawn(FLoRA(seed=3).of_run(seven)), drawn(FLoRA(seed=3)))
    assert torch.equal(drawn(FLoRA()), drawn(FLoRA(seed=0)))
    assert not torch.equal(drawn(FLoRA(seed=7)), drawn(FLoRA(seed=3)))
    seeded = FedSB(basis="seeded").of_run(seven)
    assert seeded.plan(seeded.init(START), Site("a", 1)).basis == 7
