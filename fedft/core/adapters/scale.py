"""LoRA's scale, and a whole change of the model as one plain adapter."""

from fedft.core.algebra import stack
from fedft.core.spec import LoraSpec
from fedft.core.types import Adapter, Delta


def scale_of(lora: LoraSpec, rank: int) -> float:
    """LoRA's s: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
    return lora.alpha / (rank**0.5 if lora.rslora else rank)


def effective(adapter: Adapter, delta: Delta) -> Adapter:
    """``delta`` and ``adapter`` as one adapter of plain LoRA factors on the untouched base.

    The factors are stacked, so the product is exact; scales are folded and become 1.
    """
    if not delta:
        return adapter.map_factors({m: f.folded() for m, f in adapter.factors.items()})
    factors = {
        m: stack([f, delta[m]]) if m in delta else f.folded() for m, f in adapter.factors.items()
    }
    return adapter.map_factors(factors)
