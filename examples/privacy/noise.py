"""What noise on the factors does to the product: FFA-LoRA beside both factors.

    python examples/privacy/noise.py

One layer of 384 x 384 at rank 8 with an A as LoRA draws it and a B of norm 0.5, as twelve rounds leave it.
Noise of the same standard deviation per entry is added to B, or to A and B, and the change of the
product is measured beside the formula of docs/privacy.md.
"""

import torch

D, RANK, NORM_B = 384, 8, 0.5


def measured(both: bool, sigma: float, draws: int = 20) -> tuple[float, float]:
    """Root mean square of ||error||_F, measured and by the formula."""
    g = torch.Generator().manual_seed(0)
    A = (2 * torch.rand(RANK, D, generator=g, dtype=torch.float64) - 1) / D**0.5
    B = torch.randn(D, RANK, generator=g, dtype=torch.float64)
    B *= NORM_B / B.norm()
    squares = 0.0
    for _ in range(draws):
        x = sigma * torch.randn(D, RANK, generator=g, dtype=torch.float64)
        y = sigma * torch.randn(RANK, D, generator=g, dtype=torch.float64) if both else 0.0
        squares += float(((B + x) @ (A + y) - B @ A).square().sum()) / draws
    v = sigma**2
    expected = v * D * float(A.square().sum())
    if both:
        expected += v * D * float(B.square().sum()) + v**2 * D * D * RANK
    return squares**0.5, expected**0.5


def main() -> None:
    """Print the table of the README."""
    print(
        f"| σ an entry | B alone (FFA-LoRA) | formula | A and B | formula | ratio |\n|{'---:|' * 6}"
    )
    for sigma in (0.001, 0.003, 0.01, 0.03, 0.1):
        (ffa, ffa_formula), (ab, ab_formula) = measured(False, sigma), measured(True, sigma)
        print(
            f"| {sigma} | {ffa:.3f} | {ffa_formula:.3f} | {ab:.3f} | {ab_formula:.3f} | {ab / ffa:.2f} |"
        )


if __name__ == "__main__":
    main()
