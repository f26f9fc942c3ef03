"""One vector for a text: which of a model's states it is made of, as sentence-transformers says it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import PositiveFloat
from torch import Tensor

from fedft.core.errors import MismatchError
from fedft.core.strict import Table

Pooling = Literal["mean", "cls", "last"]


class EmbeddingSpec(Table):
    """`[model] embedding`: how texts become vectors.

    Attributes:
        pooling: what a vector is made of: the ``mean`` of the states of all real tokens, that of the
            first token (``cls``), or of the ``last`` one. None takes what the model's
            sentence-transformers files say, and ``mean`` where they say nothing.
        scale: of cosines where they become logits: the inverse of the temperature.
    """

    pooling: Pooling | None = None
    scale: PositiveFloat = 20.0


@dataclass(frozen=True)
class Embedding:
    """How texts become vectors, and how their cosines become logits.

    Attributes:
        pooling: ``mean`` over the real tokens; ``cls``, the first of them; ``last``, the last of them.
        scale: of the cosine.
    """

    pooling: Pooling = "mean"
    scale: float = 20.0

    def vectors(self, states: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors times the root of the scale, so that their products are logits. [b, d]

        Args:
            states: of the last block, [b, t, d].
            mask: which tokens are real, [b, t].
        """
        states = states if states.dtype == torch.float64 else states.float()
        if self.pooling == "mean":
            real = mask[..., None].to(states.dtype)
            found = (states * real).sum(1) / real.sum(1)
        else:
            place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
            at = (
                place.masked_fill(mask == 0, mask.shape[1]).amin(1)
                if self.pooling == "cls"
                else place.masked_fill(mask == 0, -1).amax(1)
            )
            found = states[torch.arange(len(states), device=states.device), at]
        return torch.nn.functional.normalize(found, dim=-1) * self.scale**0.5


def pooling_of(folder: Path) -> Pooling:
    """What the model in ``folder`` was made with; ``mean`` where its files do not say.

    Raises:
        MismatchError: its files ask for something else than we do.
    """
    modules = _read(folder / "modules.json")
    if not isinstance(modules, list):
        return "mean"
    path = None
    for module in cast("list[dict[str, Any]]", modules):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            path = folder / str(module.get("path", "")) / "config.json"
        elif kind not in ("Transformer", "Normalize"):
            raise _unknown(folder, f"a module {kind!r} after the network")
    told = _read(path) if path is not None else None
    if not isinstance(told, dict):
        return "mean"
    config = cast("dict[str, Any]", told)
    named = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_lasttoken": "last",
    }
    on = [k for k, v in config.items() if k.startswith("pooling_mode_") and v is True]
    mode = config.get("pooling_mode")  # as newer versions write it
    wanted = [named.get(key, key) for key in on] or ([mode] if isinstance(mode, str) else [])
    wanted = ["last" if one == "lasttoken" else one for one in wanted]
    if not wanted:
        return "mean"
    if len(wanted) > 1 or wanted[0] not in ("mean", "cls", "last"):
        raise _unknown(folder, f"the pooling {' and '.join(map(str, wanted))}")
    return wanted[0]


def _unknown(folder: Path, what: str) -> MismatchError:
    return MismatchError(
        f"the sentence-transformers files in {folder} ask for {what}, which fedft does not do",
        fix='Set [model] embedding = { pooling = "mean" } to train without it, or "cls" or "last".',
    )


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
