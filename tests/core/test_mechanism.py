"""The Gaussian mechanism: its bound in exact arithmetic, its grid, its noise."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fedft.core.errors import ConfigError
from fedft.core.privacy import entropy
from fedft.core.privacy.mechanism import GaussianSum

FIGURES = [(1.0, 1.0), (0.05, 0.3), (3.7, 12.0), (1e-3, 1e3), (1e3, 1e-3), (0.1, 1e-12)]
SHAPES = [(3, 4), (7,), ()]
SIZE = 12 + 7 + 1


def vectors(count: int, seed: int, scale: float, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(count, *s, generator=g)).to(dtype) for s in SHAPES]


def none(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


def flat(parts: list[Tensor]) -> list[int]:
    return [int(n) for part in parts for n in part.flatten()]


@pytest.mark.parametrize("figures", FIGURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_vector_moves_the_sum_by_at_most_the_bound(
    figures: tuple[float, float], dtype: torch.dtype
) -> None:
    """In exact arithmetic, whatever else is in the sum, in whatever order: nothing rounds."""
    bound, multiplier = figures
    mechanism = GaussianSum(bound, multiplier, SIZE)
    limit = (Fraction(bound) / Fraction(mechanism.step)) ** 2
    others = flat(mechanism.clipped(vectors(9, 1, 5 * bound, dtype)))
    for k, scale in enumerate((1e-6, 0.1, 0.9999999, 1.0, 1.0000001, 3.0, 1e20)):
        one = vectors(1, k + 2, 1.0, dtype)
        norm = math.sqrt(sum(float(x.double().square().sum()) for x in one))
        one = [(x * (scale * bound / norm)).to(dtype) for x in one]
        both = [
            torch.cat([a, b]) for a, b in zip(vectors(9, 1, 5 * bound, dtype), one, strict=True)
        ]
        shuffled = [x[torch.arange(10).flip(0)] for x in both]
        with_it = flat(mechanism.clipped(both))
        assert with_it == flat(mechanism.clipped(shuffled))
        moved = [a - b for a, b in zip(with_it, others, strict=True)]
        assert moved == flat(mechanism.clipped(one)), "a sum of whole numbers"
        assert sum(n * n for n in moved) <= limit
    if dtype == torch.float32 and multiplier >= 1e-3:
        assert sum(n * n for n in moved) > limit * Fraction(99, 100), "and uses all of it"


def test_a_sum_in_single_precision_moves_by_more() -> None:
    """The control: what the bound is exceeded by where a sum rounds (Casacuberta et al.)."""
    one = torch.tensor([[1.0, 0.0]])
    others = torch.tensor([[float(2**24), 0.0], [1.0, 0.0]])
    before = torch.einsum("i,ij->j", torch.ones(2), others)
    after = torch.einsum("i,ij->j", torch.ones(3), torch.cat([others, one]))
    assert float((after - before).norm()) != 1.0


def test_what_is_within_the_bound_is_only_rounded() -> None:
    mechanism = GaussianSum(2.0, 1.0, SIZE)
    parts = vectors(1, 5, 0.2, torch.float32)
    for part, whole in zip(parts, mechanism.released(mechanism.clipped(parts), none), strict=True):
        assert float((part[0].double() - whole).abs().max()) <= mechanism.step / 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_no_vector_counts_as_zero(bad: float) -> None:
    """One example that overflows must not show in a release, nor empty it."""
    mechanism = GaussianSum(1.0, 1.0, SIZE)
    good = vectors(3, 1, 0.1, torch.float32)
    spoilt = [torch.cat([x, torch.full((1, *x.shape[1:]), bad)]) for x in good]
    assert flat(mechanism.clipped(spoilt)) == flat(mechanism.clipped(good))


@pytest.mark.parametrize("figures", FIGURES)
def test_all_that_is_released_lies_on_one_grid(figures: tuple[float, float]) -> None:
    """Mironov: the values that can come out must not depend on what went in."""
    mechanism = GaussianSum(*figures, SIZE)
    for seed in range(3):
        sums = mechanism.clipped(vectors(4, seed, figures[0], torch.float32))
        for part in mechanism.released(sums, entropy.gaussian):
            steps = (part / mechanism.step).round()
            assert torch.equal(steps * mechanism.step, part), "a function of a whole number"


def test_plain_addition_leaves_values_that_only_one_sum_can_have() -> None:
    """The control: float noise added to 0 and to 1/3 of it; the results are told apart by last bits."""
    noise = entropy.gaussian(1000).numpy() * 1e-3
    reachable = (noise + 1 / 3) - 1 / 3 == noise  # what would hold were the sets of values equal
    assert reachable.mean() < 0.1


@pytest.mark.parametrize("figures", FIGURES[:4])
def test_the_noise_is_a_gaussian_of_the_stated_size(figures: tuple[float, float]) -> None:
    count = 400_000
    mechanism = GaussianSum(*figures, count)
    (seen,) = mechanism.released([torch.zeros(count, dtype=torch.int64)], entropy.gaussian)
    x = seen / mechanism.deviation
    assert mechanism.deviation == figures[0] * figures[1]
    assert abs(float(x.mean())) < 6 / math.sqrt(count)
    assert abs(float(x.var()) - 1) < 6 * math.sqrt(2 / count)
    assert abs(float((x**4).mean()) - 3) < 6 * math.sqrt(96 / count)
    assert len(seen.unique()) > 0.7 * count


@pytest.mark.parametrize("z", [1e-30, 1e-12, 1e-6, 1e-3, 0.3, 1.0, 20.0, 1e3])
@pytest.mark.parametrize("size", [1, 10_000, 10**7, 10**9])
def test_the_grid_is_fine_enough_and_fits_into_64_bits(z: float, size: int) -> None:
    mechanism = GaussianSum(0.7, z, size)
    lost = mechanism.step * math.sqrt(size) / 2
    assert lost <= 0.7 / 500
    assert 0.7 / mechanism.step <= 2**45, "2^18 vectors add up below 2^63"
    assert 13 * 2.0**mechanism.bits < 2**62, "and so does the noise"
    if z >= 1e-6:
        assert mechanism.bits >= 20


@pytest.mark.parametrize(
    "figures",
    [(1.0, 0.0), (1.0, -1.0), (0.0, 1.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0),
     (1.0, math.inf), (1.0, 1e14), (1.0, 1e300)],
)  # fmt: skip
def test_figures_that_no_noise_can_be_made_of_are_refused(figures: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="cannot be made"):
        GaussianSum(*figures, 1000)


def test_a_hand_made_round() -> None:
    """C = 2, z = 1/2, d = 2: g = 2^-20, C' = 2 - 2^-29 - 2^-20.5; [4 0] → C', [0 1] stays."""
    mechanism = GaussianSum(2.0, 0.5, 2)
    assert mechanism.step == 2.0**-20
    (steps,) = mechanism.clipped([torch.tensor([[4.0, 0.0], [0.0, 1.0]])])
    assert steps.tolist() == [2**21 - 1, 2**20]
    ones = torch.tensor([1.0, -1.0], dtype=torch.float64)
    (seen,) = mechanism.released([steps], lambda count: ones[:count])
    assert seen.tolist() == [2 - 2.0**-20 + 1, 1 - 1]
