"""FedRot-LoRA: its schedule by hand, and what it promises of bases."""

from dataclasses import replace
from math import sqrt

import pytest
import torch

from fedft.core.types import Adapter, ClientUpdate, Factors, ServerState
from fedft.strategies import FedAvgLoRA, FedRotLoRA
from fedft.strategies.fedrot_lora import aligned, rotation
from tests.strategies import test_goldens
from tests.strategies.test_goldens import check, matrix, play
from tests.strategies.test_invariants import adapter, bias, cohort, combine, draw, gap, near

by_hand = test_goldens.adapter


def test_the_schedule_of_the_authors() -> None:
    """Their rounds count from 0, ours from 1."""
    assert [aligned(round_) for round_ in range(1, 7)] == [None, "A", "B", "A", "B", "A"]


class TestByHand:
    # The reference is A = I. Site 2 holds 2 I in a basis turned by J = [0 -1; 1 0]: A = J, B = 2 J^T.
    START = by_hand([[1, 0], [0, 1]], [[0, 0], [0, 0]])
    SITES = (
        (by_hand([[1, 0], [0, 1]], [[1, 0], [0, 1]]), 1),
        (by_hand([[0, -1], [1, 0]], [[0, 2], [-2, 0]]), 1),
    )

    H = 1 / sqrt(2)
    UNTURNED = ([[0.5, -0.5], [0.5, 0.5]], [[0.5, 1], [-1, 0.5]])  # (I + J) / 2, (I + 2 J^T) / 2

    def round(self, number, start=START, sites=SITES, **settings):
        rule = FedRotLoRA(**settings)
        return play(rule, start, sites, ServerState(start, round=number - 1))

    def test_the_schedule(self):
        # Round 1: nothing is turned. Round 2, on A: M = J, R = J, so R^T A = I and B R = 2 I, and
        # the mean is exact. Round 3, on B, whose reference is zero: nothing again. Round 4: A.
        exact = ([[1, 0], [0, 1]], [[1.5, 0], [0, 1.5]])
        for number, (A, B) in enumerate((self.UNTURNED, exact, self.UNTURNED, exact), 1):
            check(self.round(number), A, B)

    def test_on_B(self):
        # The reference is B = I, and A = 0 now. Round 3: M = B_2^T I = 2 J, R = J as above; in
        # rounds 2 and 4 it is A that has no reference.
        start = by_hand([[0, 0], [0, 0]], [[1, 0], [0, 1]])
        exact = ([[1, 0], [0, 1]], [[1.5, 0], [0, 1.5]])
        check(self.round(3, start), *exact)
        check(self.round(5, start), *exact)
        for number in (1, 2, 4):
            check(self.round(number, start), *self.UNTURNED)

    def test_rounds_follow_each_other(self):
        # From the start, the same replies each time. Round 1 leaves A = (I + J) / 2 = H / sqrt(2),
        # with H the rotation by 45 degrees, and B = (I + 2 J^T) / 2. Round 2, on A:
        # site 1: M = I A^T = H^T / sqrt(2), R = H^T, so A = H and B = H^T.
        # site 2: M = J A^T = J H^T / sqrt(2) = H / sqrt(2), R = H, so A = H^T J = H, B = 2 J^T H = 2 H^T.
        rule, h = FedRotLoRA(), self.H
        state = play(rule, self.START, self.SITES)
        check(state, *self.UNTURNED)
        state = play(rule, self.START, self.SITES, state)
        check(state, [[h, -h], [h, h]], [[1.5 * h, 1.5 * h], [-1.5 * h, 1.5 * h]])

    def test_a_reflection(self):
        # Site 2 holds 2 I with its rows exchanged: A = X = [0 1; 1 0], B = 2 X. Hard: R = X, exact.
        # Soft, strength 1: M = X = U S V^T has equal singular values, so that every rotation by any
        # angle comes as close, to ||R^T X - I||^2 = 4; what is sure is that the mean is not exact.
        X = by_hand([[0, 1], [1, 0]], [[0, 2], [2, 0]])
        sites = (self.SITES[0], (X, 1))
        check(self.round(2, sites=sites), [[1, 0], [0, 1]], [[1.5, 0], [0, 1.5]])
        f = self.round(2, sites=sites, strength=1.0).adapter.factors["m"]
        assert not torch.allclose(f.product(), matrix([[1.5, 0], [0, 1.5]]), atol=0.1)

    def test_full_soft_rotation(self):
        check(self.round(2, strength=1.0), [[1, 0], [0, 1]], [[1.5, 0], [0, 1.5]])

    def test_half_a_rotation(self):
        # R' = nearest rotation to (I + J) / 2, by 45 degrees: (I + J) / sqrt(2) = H.
        # H^T J = H and 2 J^T H = 2 H^T, so A = (I + H) / 2 and B = (I + 2 H^T) / 2.
        h = self.H
        A = [[(1 + h) / 2, -h / 2], [h / 2, (1 + h) / 2]]
        check(self.round(2, strength=0.5), A, [[0.5 + h, h], [-h, 0.5 + h]])

    def test_no_rotation(self):
        check(self.round(2, strength=0.0), *self.UNTURNED)


class TestAlignment:
    @pytest.mark.parametrize("strength", [None, 0.3, 0.5, 1.0])
    @pytest.mark.parametrize("on", ["A", "B"])
    def test_rotations_keep_the_product_and_come_no_further(self, strength, on):
        reference = adapter(9).factors["a.q"]
        for seed in range(8):
            x = adapter(seed).factors["a.q"]
            R = rotation(x, reference, strength, on=on)
            assert torch.allclose(R.T @ R, torch.eye(4, dtype=torch.float64), atol=1e-12)
            assert gap(x.B @ R @ R.T @ x.A, x.B @ x.A) < 1e-13
            if strength is not None:
                assert float(torch.linalg.det(R)) == pytest.approx(1.0)
            if strength in (None, 1.0):
                mine, theirs = (x.A, reference.A) if on == "A" else (x.B, reference.B)
                turned = R.T @ mine if on == "A" else mine @ R
                assert (turned - theirs).norm() <= (mine - theirs).norm() * (1 + 1e-12)

    def test_the_best_rotation(self):
        """Against many random ones: none comes closer to the reference, nor does a reflection."""
        x, reference = adapter(1).factors["a.q"], adapter(2).factors["a.q"]
        hard = (rotation(x, reference, None, on="A").T @ x.A - reference.A).norm()
        soft = (rotation(x, reference, 1.0, on="A").T @ x.A - reference.A).norm()
        assert hard <= soft
        g = torch.Generator().manual_seed(0)
        for _ in range(200):
            Q = torch.linalg.qr(draw(g, 4, 4)).Q
            assert (Q.T @ x.A - reference.A).norm() >= hard
            Q[:, 0] *= torch.linalg.det(Q).sign()
            assert (Q.T @ x.A - reference.A).norm() >= soft

    @staticmethod
    def turned(start, proper, shift=0.0):
        """Four sites that learned one thing and hold it in bases of their own."""
        g = torch.Generator().manual_seed(1)
        learned = near(start, 9, size=shift).adapter if shift else start
        updates = []
        for k in range(4):
            Q = torch.linalg.qr(draw(g, 4, 4)).Q
            Q[:, 0] *= torch.linalg.det(Q).sign() * (1 if proper else (-1) ** k)
            factors = {m: Factors(Q.T @ f.A, f.B @ Q, f.scale) for m, f in learned.factors.items()}
            updates.append(ClientUpdate(f"s{k}", 3, Adapter(factors, start.head).tensors(), start))
        return updates

    @pytest.mark.parametrize("round_", [1, 2])  # on A, then on B
    @pytest.mark.parametrize("shift", [0.0, 0.5])
    @pytest.mark.parametrize("proper", [True, False], ids=["rotations", "reflections"])
    def test_it_undoes_a_pure_change_of_basis(self, round_, shift, proper):
        """Sites that agree but for their bases: the whole bias was the choice of basis."""
        updates = self.turned(adapter(), proper, shift)
        assert bias(updates, combine(FedAvgLoRA(), updates)) > 0.3
        assert bias(updates, combine(FedRotLoRA(), updates, round=round_)) < 1e-13

    def test_the_soft_rotation_undoes_rotations_but_no_reflections(self):
        updates = self.turned(adapter(), proper=True)
        assert bias(updates, combine(FedRotLoRA(strength=1.0), updates, round=1)) < 1e-13
        reflected = self.turned(adapter(), proper=False)
        assert bias(reflected, combine(FedRotLoRA(strength=1.0), reflected, round=1)) > 0.1

    @pytest.mark.parametrize("strength", [None, 0.5, 1.0])
    def test_the_first_round_turns_nothing(self, strength):
        updates = self.turned(adapter(), proper=True)
        x, y = (combine(r, updates).adapter for r in (FedRotLoRA(strength=strength), FedAvgLoRA()))
        for name, tensor in y.tensors().items():
            assert torch.allclose(x.tensors()[name], tensor, atol=1e-14)

    def test_strength_zero_is_fedavg(self):
        updates = cohort(adapter())
        for t in range(3):
            x, y = (
                combine(r, updates, round=t).adapter
                for r in (FedRotLoRA(strength=0.0), FedAvgLoRA())
            )
            for name, tensor in y.tensors().items():
                assert torch.allclose(x.tensors()[name], tensor, atol=1e-14)

    @pytest.mark.parametrize("strength", [None, 0.5, 1.0])
    def test_a_reference_of_zero_turns_nothing(self, strength):
        start = Adapter({m: replace(f, B=0 * f.B) for m, f in adapter().factors.items()})
        R = rotation(adapter(1).factors["a.q"], start.factors["a.q"], strength, on="B")
        assert torch.allclose(R, torch.eye(4, dtype=torch.float64), atol=1e-15)

    @pytest.mark.parametrize("strength", [None, 1.0])
    def test_directions_that_the_reference_leaves_open_stay_where_they_are(self, strength):
        """Columns of B that nobody has moved: nothing says how the rows of A beside them turn."""
        x, reference = adapter(1).factors["a.q"], adapter(2).factors["a.q"]
        idle = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
        R = rotation(
            replace(x, B=x.B * idle), replace(reference, B=reference.B * idle), strength, on="B"
        )
        assert torch.allclose(R.T @ R, torch.eye(4, dtype=torch.float64), atol=1e-12)
        busy = rotation(
            Factors(x.A[::2], x.B[:, ::2], 1.0),
            Factors(reference.A[::2], reference.B[:, ::2], 1.0),
            None,  # what makes R proper is done where it costs nothing
            on="B",
        )
        assert torch.allclose(R[::2, ::2], busy, atol=1e-12)
        if strength is None:
            assert torch.allclose(R[1::2, 1::2], torch.eye(2, dtype=torch.float64), atol=1e-12)
