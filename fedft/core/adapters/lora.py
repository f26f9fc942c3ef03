"""Plain LoRA: factors A and B of one rank in every adapted layer.

PiSSA and OLoRA are LoRA whose factors start at the base weights.
"""

from pathlib import Path

from torch import Tensor, nn

from fedft.core.adapters.base import Export, Family, Modules, Shapes
from fedft.core.adapters.files import save_adapter
from fedft.core.spec import LoraSpec


class LoRA(Family):
    """See the module."""

    name = "lora"

    def check(self, lora: LoraSpec) -> None:
        """Nothing that the table itself does not hold to."""

    def draws(self, lora: LoraSpec) -> bool:
        """With PiSSA and OLoRA."""
        return lora.init != "default"

    def shapes(self, model: nn.Module, lora: LoraSpec, modules: Modules) -> Shapes:
        """Layers and a rank say it all."""
        return {}

    def initial(self, shapes: Shapes, seed: int) -> dict[str, Tensor]:
        """Factors are not carried whole."""
        return {}

    def save(self, folder: Path, export: Export) -> None:
        """One adapter, the change of the base weights folded in."""
        save_adapter(
            folder,
            export.adapter,
            export.delta,
            task=export.model.task,
            base=export.model.source,
            revision=export.model.revision,
            head=export.head,
            beside=export.beside,
            transposed=export.transposed,
        )
