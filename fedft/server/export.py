"""A state's global adapter as PEFT writes one."""

from pathlib import Path
from typing import Any

from fedft.core import models
from fedft.core.adapters.files import save_adapter, save_mixture, save_whole
from fedft.core.card import Origin, save_card
from fedft.core.types import ServerState
from fedft.server.setting import Setting


def export(setting: Setting, state: ServerState, folder: Path) -> None:
    """Write a state's global adapter as PEFT does, with a card that says what it is."""
    config, head = setting.config, setting.shapes.saved
    classes = len(setting.data.classes)
    about: dict[str, Any] = {
        "base": config.model.source,
        "head": head,
        "beside": models.frozen_values(config.model, classes, head),
    }
    whole: dict[str, Any] = {"model": config.model, "lora": config.lora}
    if config.lora.method == "hydralora":
        save_mixture(folder, state.adapter, classes=classes, **whole, **about)
    elif config.lora.whole:
        from fedft.core.models.start import frozen_tensors  # peft takes a second to import

        frozen, targets = frozen_tensors(config.model, config.lora, config.seed)
        own = {"seed": config.seed, "targets": targets, "frozen": frozen}
        save_whole(folder, state.adapter, **own, **whole, **about)
    else:
        save_adapter(
            folder,
            state.adapter,
            state.delta,
            task=config.model.task,
            revision=config.model.revision,
            transposed=setting.shapes.transposed,
            **about,
        )
    origin = Origin(
        config.model,
        setting.hashes,
        setting.data.classes,
        config.strategy.name,
        state.round,
        config.lora.method,
    )
    save_card(folder, origin)
