"""HydraLoRA's full mixture as a model: all heads, weighed by their routers for every token."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_mixture(
    folder: str | Path, *, base: str | None = None, device: str = "cpu"
) -> "PreTrainedModel":
    """The pretrained model with an exported HydraLoRA adapter in it.

    Args:
        folder: of the export, with ``mixture.json`` and ``mixture.safetensors``.
        base: the base model, where it does not lie where it lay at the server: as
            ``[model] source``.
        device: torch device.

    Returns:
        In evaluation mode, in float32, with no parameter that requires a gradient. It gives the
        run's own logits, with the routers of the export: those of the server.

    Raises:
        MismatchError: the folder holds no mixture, or the base model is not there.
    """
    from fedft.clients.engines.hydra import mixture
    from fedft.core import models
    from fedft.core.adapters import hydra
    from fedft.core.spec import LoraSpec, ModelSpec

    adapter, about = hydra.load_mixture(Path(folder))
    spec = ModelSpec(source=base or about["base"], task=about["task"])
    lora = LoraSpec(
        method="hydralora",
        heads=about["heads"],
        rank=about["rank"],
        alpha=about["scale"] * about["rank"],
        target_modules=tuple(hydra.modules(adapter)),
    )
    loaded = models.load_base(spec, lora, about["classes"], device=device)
    return cast("PreTrainedModel", mixture(loaded, lora, adapter))
