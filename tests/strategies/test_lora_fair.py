"""LoRA-FAIR at any scale of its factors: the descent never loses, the ridge is never singular."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedft.core import meters
from fedft.core.folding import fold
from fedft.core.types import Adapter, ClientUpdate, Factors, ServerState, factor_name
from fedft.strategies import FedAvgLoRA, LoRAFAIR
from fedft.strategies.base import layers
from fedft.strategies.lora_fair import ridge_residual

M, N, RANK = 12, 9, 3  # d_out, d_in, r
NAMES = factor_name("m", "A"), factor_name("m", "B")

Pair = tuple[Tensor, Tensor]


def pairs(seed: int, count: int = 4, spread: float = 0.3) -> list[Pair]:
    """A and B of sites around a common start; the means have a norm of about one."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) / (shape[0] * shape[1]) ** 0.5

    A, B = draw(RANK, N), draw(M, RANK)
    return [(A + spread * draw(RANK, N), B + spread * draw(M, RANK)) for _ in range(count)]


def opposed(seed: int) -> list[Pair]:
    """B has a mean of zero, dW has not."""
    return [(A, sign * B) for (A, _), sign in zip(pairs(seed, 2), (1, -1), strict=True)
            for B in [pairs(seed, 1)[0][1]]]  # fmt: skip


def masked(seed: int, keep: Tensor) -> list[Pair]:
    return [(A * keep, B) for A, B in pairs(seed)]


COHORTS = {
    "near": pairs(1),
    "far": pairs(2, spread=3.0),
    "many": pairs(3, count=7),  # 7 * 3 columns: wider than d_out
    "one": pairs(4, count=1),
    "identical": pairs(5, count=1) * 3,
    "opposed": opposed(6),
    "cancelling": [pairs(7)[0], (pairs(7)[0][0], -pairs(7)[0][1])],
    "one A": [(pairs(8)[0][0], B) for _, B in pairs(8)],
    "one B": [(A, pairs(9)[0][1]) for A, _ in pairs(9)],
    "B of zero": [(A, 0 * B) for A, B in pairs(10)],
    "A of zero": [(0 * A, B) for A, B in pairs(11)],
    "a row of A repeated": [(A[[0, 0, 1]], B) for A, B in pairs(12)],
    "an input that is never used": masked(13, (torch.arange(N) > 0).double()),
    "columns of any size": masked(14, torch.logspace(-12, 3, N, dtype=torch.float64)),
    "clients of any size": [(A * 10.0 ** (2 * k), B * 10.0 ** (-3 * k))
                          for k, (A, B) in enumerate(pairs(15))],
    "a B that only some rows use": [(A, B * (torch.arange(M) < 2).double()[:, None])
                                    for A, B in pairs(16)],
    "X A of zero": [(A * torch.tensor([[1.0], [0], [0]], dtype=torch.float64),
                     B * torch.tensor([0.0, 1, 1], dtype=torch.float64)) for A, B in pairs(17)],
}  # fmt: skip
SCALES = (
    (1.0, 1.0),
    (1e3, 1e6),
    (1e-3, 1.0),
    (1e-6, 1.0),
    (1e-3, 1e-3),
    (1e-20, 1e-20),
    (1.0, 1e-6),
)
"""Of B and of A."""
cohorts = pytest.mark.parametrize("cohort", COHORTS.values(), ids=COHORTS.keys())
dims = pytest.mark.parametrize("dim", ["whole", "column"])


def updates_of(
    cohort: list[Pair], b: float = 1.0, a: float = 1.0, dtype: torch.dtype = torch.float64
) -> list[ClientUpdate]:
    start = Adapter({"m": Factors(torch.zeros(RANK, N), torch.zeros(M, RANK), 2.0)})
    return [
        ClientUpdate(
            f"s{k}",
            3 + k,
            dict(zip(NAMES, ((a * A).to(dtype), (b * B).to(dtype)), strict=True)),
            start,
        )
        for k, (A, B) in enumerate(cohort)
    ]


def objective(updates: list[ClientUpdate], B: Tensor, X: Tensor, dim: str, ridge: float) -> float:
    """1 - cos(dW, X A) + ridge ||X - B||^2, formed in full and in units of its own.

    What is rounding in dW or X A counts as zero, and a cosine with zero is zero.
    """
    (layer,) = layers(updates)
    parts = [(p, x.A.double(), x.B.double()) for p, x in zip(layer.p, layer.parts, strict=True)]
    A = sum((p * A for p, A, _ in parts), torch.zeros(RANK, N, dtype=torch.float64))
    dW = sum((p * (B @ A) for p, A, B in parts), torch.zeros(M, N, dtype=torch.float64))
    Y = X @ A
    terms = sum(p * (B.abs() @ A.abs()) for p, A, B in parts)

    def measure(x: Tensor) -> Tensor:
        return x if dim == "column" else x.reshape(-1, 1)

    total = []
    for w, y, t, s in zip(
        measure(dW).T, measure(Y).T, measure(terms).T, measure(X.abs() @ A.abs()).T, strict=True
    ):
        if w.norm() <= 1e-7 * t.norm() or y.norm() <= 1e-7 * s.norm():
            total.append(0.0)
        else:
            total.append(float((w / w.norm()) @ (y / y.norm())))
    return 1 - sum(total) / len(total) + ridge * float((X - B).square().sum())


def corrected(updates: list[ClientUpdate], **settings: object) -> Pair:
    """B, and B + dB."""
    found = [
        rule.aggregate(ServerState(updates[0].start), updates).adapter.factors["m"].B
        for rule in (FedAvgLoRA(), LoRAFAIR(**settings))  # type: ignore[arg-type]
    ]
    return found[0], found[1]


@cohorts
@dims
@pytest.mark.parametrize("ridge", [0.01, 10.0])
def test_the_descent_never_loses_and_B_never_grows_much(
    cohort: list[Pair], dim: str, ridge: float
) -> None:
    """objective(dB*) <= objective(0) and ||B + dB|| <= 1.7 ||B||, at every scale of either factor.

    A step down a cosine is across X, not along it, and ||X||^2 grows with its square: by e at most,
    over steps of a quarter of the inverse curvature.
    """
    for b, a in SCALES:
        updates = updates_of(cohort, b, a)
        B, X = corrected(
            updates, objective="cosine", cosine_dim=dim, ridge=ridge, steps=30, step_size=0.05
        )
        assert X.isfinite().all()
        before, after = (objective(updates, B, x, dim, ridge) for x in (B, X))
        assert after <= before + 1e-14 * max(1.0, before), (b, a)
        assert X.norm() <= 1.7 * B.norm(), (b, a)


@dims
def test_the_step_that_is_safe_is_the_only_one_taken(dim: str) -> None:
    """The control: a descent of fixed steps, as published, breaks both at small B."""
    updates = updates_of(COHORTS["near"], b=1e-3)
    (layer,) = layers(updates)
    A = sum(p * x.A for p, x in zip(layer.p, layer.parts, strict=True))
    B = sum(p * x.B for p, x in zip(layer.p, layer.parts, strict=True))
    dW = sum(p * x.B @ x.A for p, x in zip(layer.p, layer.parts, strict=True))
    X = B.clone().requires_grad_()  # type: ignore[union-attr]
    for _ in range(60):
        pair = (dW, X @ A) if dim == "column" else (dW.flatten(), (X @ A).flatten())  # type: ignore[union-attr]
        loss = 1 - torch.cosine_similarity(*pair, dim=0).mean() + 0.01 * (X - B).square().sum()
        (gradient,) = torch.autograd.grad(loss, X)
        X = (X - 0.05 * gradient).detach().requires_grad_()
    assert X.norm() > 100 * B.norm()  # type: ignore[union-attr]


@dims
def test_the_correction_is_the_same_at_every_scale_of_small_factors(dim: str) -> None:
    """Relative to B, once B is small: neither the cosine nor the step knows a scale."""
    settings = {"objective": "cosine", "cosine_dim": dim, "steps": 100}
    turned: list[Tensor] = []
    for b, a in ((1e-3, 1.0), (1e-6, 1e3), (1e-12, 1e-9)):
        B, X = corrected(updates_of(COHORTS["near"], b, a), **settings)
        turned.append((X - B) / B.norm())
    assert turned[0].norm() > 1e-3
    for other in turned[1:]:
        assert torch.allclose(other, turned[0], rtol=1e-4)


@pytest.mark.parametrize("b", [10.0, 1.0, 0.1, 1e-3, 1e-6])
def test_the_bias_does_not_rise_either(b: float) -> None:
    """Between sites that are near each other, where the cosine and the error go together."""
    updates = updates_of(COHORTS["near"], b, 3.0)
    state = ServerState(updates[0].start)

    def relative(rule: FedAvgLoRA | LoRAFAIR) -> float:
        after = rule.aggregate(state, updates)
        found = meters.measure(state, fold(updates), after)["bias"]["relative"]
        assert found is not None
        return found

    assert relative(LoRAFAIR(objective="cosine")) <= relative(FedAvgLoRA())  # type: ignore[arg-type]


@dims
def test_ordinary_factors_take_the_published_steps(dim: str) -> None:
    """Where ||X A||^2 / lambda_max is above four steps nothing is shortened: halving them shows."""
    updates = updates_of(COHORTS["near"], b=30.0)
    settings = {"objective": "cosine", "cosine_dim": dim, "ridge": 1e-6}
    B, one = corrected(updates, steps=1, step_size=0.02, **settings)
    _, two = corrected(updates, steps=2, step_size=0.01, **settings)
    _, half = corrected(updates, steps=1, step_size=0.01, **settings)
    assert torch.allclose(one - B, two - B, rtol=1e-3, atol=1e-12)
    assert torch.allclose(one - B, 2 * (half - B), rtol=1e-6, atol=1e-12)


def test_a_ridge_that_outweighs_the_cosine_is_followed_down() -> None:
    """ridge * step-size near one overshoots: the step is halved, never the law broken."""
    updates = updates_of(COHORTS["far"], b=20.0)
    B, X = corrected(updates, objective="cosine", ridge=9.9, step_size=0.1, steps=30)
    assert objective(updates, B, X, "whole", 9.9) <= objective(updates, B, B, "whole", 9.9)


class TestRidge:
    @cohorts
    @pytest.mark.parametrize("ridge", [1e-300, 1e-12, 0.01, 1e12])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
    def test_it_has_an_answer_for_every_A(
        self, cohort: list[Pair], ridge: float, dtype: torch.dtype
    ) -> None:
        """And one that is no worse than none: the bias of the product never rises."""
        for b, a in ((1.0, 1.0), (1e10, 1e10), (1e-30, 1e10), (1.0, 1e-30)):
            updates = updates_of(cohort, b, a, dtype)
            (layer,) = layers(updates)
            A = sum((p * x.A.double() for p, x in zip(layer.p, layer.parts, strict=True)),
                    torch.zeros(RANK, N, dtype=torch.float64))  # fmt: skip
            dB = ridge_residual(layer, A, ridge)
            assert dB.isfinite().all()
            B, X = corrected(updates, ridge=ridge)
            assert X.isfinite().all()
            dW = sum(p * (x.B.double() @ x.A.double() / (a * b))
                     for p, x in zip(layer.p, layer.parts, strict=True))  # fmt: skip
            gaps = [float((dW - x.double() / b @ A / a).norm()) for x in (B, X)]
            size = float(sum(p * x.B.double().norm() / b * (x.A.double().norm() / a)
                             for p, x in zip(layer.p, layer.parts, strict=True)))  # fmt: skip
            assert gaps[1] <= gaps[0] + 2e-6 * size, (b, a)

    def test_without_its_floor_it_can_be_singular(self) -> None:
        """The control: the very matrices of the test above have no inverse."""
        A = COHORTS["A of zero"][0][0]
        with pytest.raises(torch.linalg.LinAlgError):
            torch.linalg.solve(A @ A.T + 1e-300 * 0, A)
        row = torch.tensor([[1.0, 2, 3]], dtype=torch.float64)
        G = row.expand(2, 3) @ row.expand(2, 3).T
        with pytest.raises(torch.linalg.LinAlgError):
            torch.linalg.solve(G + 1e-300 * torch.eye(2, dtype=G.dtype), torch.ones(2, 1).double())

    def test_a_floor_is_nothing_that_a_ridge_above_it_feels(self) -> None:
        updates = updates_of(COHORTS["near"])
        (layer,) = layers(updates)
        A = sum(p * x.A for p, x in zip(layer.p, layer.parts, strict=True))
        dense = A @ A.T + 1e-9 * (A @ A.T).trace() / RANK * torch.eye(RANK, dtype=A.dtype)  # type: ignore[union-attr]
        B = sum(p * x.B for p, x in zip(layer.p, layer.parts, strict=True))
        dW = sum(p * x.B @ x.A for p, x in zip(layer.p, layer.parts, strict=True))
        expected = torch.linalg.solve(dense, ((dW - B @ A) @ A.T).T).T  # type: ignore[union-attr]
        assert torch.allclose(ridge_residual(layer, A, 1e-9), expected, rtol=1e-6)  # type: ignore[arg-type]

    def test_equal_sites_of_a_singular_A_stay_as_they_are(self) -> None:
        updates = updates_of(COHORTS["a row of A repeated"][:1] * 3)
        B, X = corrected(updates, ridge=1e-300)
        assert torch.allclose(X, B, rtol=1e-12)


def test_one_layer_that_is_idle_holds_up_no_other() -> None:
    """Layer by layer: a layer of zeros beside one that moved."""
    updates = updates_of(COHORTS["near"])
    idle = {
        factor_name("z", "A"): torch.zeros(RANK, N),
        factor_name("z", "B"): torch.zeros(M, RANK),
    }
    start = Adapter({**updates[0].start.factors, "z": Factors(*idle.values(), 2.0)})
    both = [replace(u, tensors={**u.tensors, **idle}, start=start) for u in updates]
    for settings in ({}, {"objective": "cosine"}, {"objective": "cosine", "cosine_dim": "column"}):
        alone = corrected(updates, **settings)[1]
        after = LoRAFAIR(**settings).aggregate(ServerState(start), both).adapter.factors  # type: ignore[arg-type]
        assert torch.equal(after["m"].B, alone)
        assert not after["z"].B.any()
