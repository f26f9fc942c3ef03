"""A state's global adapter as PEFT writes one."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedft.core import models
from fedft.core.adapters import Export, family_of
from fedft.core.card import Origin, save_card
from fedft.core.types import ServerState
from fedft.server.setting import Setting


def export(setting: Setting, state: ServerState, folder: Path) -> None:
    """Write a state's global adapter as PEFT does, with a card that says what it is."""
    config, head = setting.config, setting.shapes.saved
    classes, family = len(setting.data.classes), family_of(config.lora)

    def frozen() -> tuple[Mapping[str, Tensor], list[str]]:  # peft takes a second to import
        from fedft.core.models.start import frozen_tensors

        return frozen_tensors(config.model, config.lora, config.seed)

    family.save(
        folder,
        Export(
            state.adapter,
            state.delta,
            config.model,
            config.lora,
            head,
            models.frozen_values(config.model, classes, head),
            classes,
            config.seed,
            setting.shapes.transposed,
            frozen,
        ),
    )
    origin = Origin(
        config.model,
        setting.hashes,
        setting.data.classes,
        config.strategy.name,
        state.round,
        config.lora.method,
        family.note,
    )
    save_card(folder, origin)
