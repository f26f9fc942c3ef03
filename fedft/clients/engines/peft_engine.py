"""Local training of peft methods other than LoRA, whose tensors are carried whole."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import cast

from peft import PeftModel
from torch import nn

from fedft.clients.engines.loop import LoopEngine
from fedft.core.adapters import peft
from fedft.core.models import Base
from fedft.core.spec import LoraSpec
from fedft.core.types import Adapter, TrainPlan


class WholeEngine(LoopEngine):
    """Trains whatever ``lora.method`` puts into the adapted layers, one site after another.

    Args:
        base: the frozen model; its adapted layers are wrapped by peft.
        lora: the `[lora]` table.
        seed: of the run, from which methods with frozen random projections make them.
    """

    def __init__(
        self, base: Base, lora: LoraSpec, seed: int, *, checkpointing: bool = False
    ) -> None:
        before = set(base.model.modules())
        wrapped = peft.injected(base.model, lora, base.adapted, seed).eval()
        self._tensors = peft.trained(wrapped)
        self._added = [m for m in wrapped.modules() if m not in before]
        super().__init__(base, wrapped, checkpointing=checkpointing)

    def _layers_named(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._tensors.items()

    def _off(self) -> AbstractContextManager[object]:
        return cast(PeftModel, self._model).disable_adapter()

    def _dropouts(self) -> Iterable[nn.Module]:
        return ()

    def _dropout(self, active: bool) -> None:
        """Whatever the method does in training alone, in its own modules and in no other."""
        for module in self._added:
            module.training = active

    def _load(self, adapter: Adapter, plan: TrainPlan | None) -> None:
        for name, parameter in self._tensors.items():
            parameter.data = adapter.head[name].to(parameter.device, copy=True)
            parameter.requires_grad_(plan is not None and plan.trains(name))
            parameter.grad = None
        self._load_head(adapter, plan)
