"""Families of adapters, one a file; :func:`family_of` is the table."""

from fedft.core.adapters.base import Export, Family
from fedft.core.adapters.hydra import HydraLoRA
from fedft.core.adapters.lora import LoRA
from fedft.core.adapters.peft import Peft
from fedft.core.spec import LoraSpec

__all__ = ["FAMILIES", "PEFT", "Export", "Family", "family_of"]

FAMILIES: tuple[Family, ...] = (LoRA(), HydraLoRA())
"""The families with code of their own: a row each."""

PEFT = Peft()
"""The family of every other `[lora] method`."""


def family_of(lora: LoraSpec) -> Family:
    """The family that a `[lora]` table means."""
    return next((family for family in FAMILIES if family.name == lora.form), PEFT)
