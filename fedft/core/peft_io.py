"""Adapters on disk, exactly as PEFT writes and reads them."""

# pyright: standard
# safetensors is typed in part.

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fedft.core.algebra import pad
from fedft.core.errors import MismatchError, SecurityRefusal
from fedft.core.files import Files, disk, write_file
from fedft.core.models import PEFT_TASK, effective
from fedft.core.types import PREFIX, Adapter, Delta, Factors, factor_name, module_of, part_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def save_adapter(
    folder: Path, adapter: Adapter, delta: Delta, *, task: str, base: str, revision: str | None
) -> None:
    """Write an adapter that ``PeftModel.from_pretrained`` loads and that gives the run's own logits.

    A change of the base weights is folded in by stacking, which raises the rank; modules of a
    smaller rank are padded with zeros, so that one rank and one alpha describe all of them.

    Args:
        folder: created if needed.
        adapter: the global adapter.
        delta: the change of the base weights, in factored form; empty for most rules.
        task: as in :class:`~fedft.core.spec.ModelSpec`.
        base: name or folder of the base model, for the reader.
        revision: of the base model.

    Raises:
        EnvironmentFailure: the disk refused.
    """
    plain = effective(adapter, delta)
    rank = max(plain.rank, 1)
    scale = next((f.scale for f in plain.factors.values()), 1.0)
    folded = {
        module: pad(f if f.scale == scale else Factors(f.A * (f.scale / scale), f.B, scale), rank)
        for module, f in plain.factors.items()
    }
    heads = sorted({name.removeprefix(PREFIX).split(".")[0] for name in plain.head})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": PEFT_TASK[task],
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(folded),
        "modules_to_save": heads or None,
        "inference_mode": True,
    }
    tensors = {n: t.contiguous() for n, t in plain.map_factors(folded).tensors().items()}
    with disk(f"create {folder}"):
        Files().mkdir(folder)
        Files().sync_folder(folder.parent)
    write_file(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    write_file(folder / CONFIG, json.dumps(config, indent=2).encode() + b"\n")


def load_adapter(folder: Path) -> Adapter:
    """Read an adapter that PEFT, or :func:`save_adapter`, wrote.

    Raises:
        SecurityRefusal: it is a pickle (``adapter_model.bin``), which can run code when read.
        MismatchError: files are missing, or it is no plain LoRA adapter.
    """
    if not (folder / WEIGHTS).exists():
        if pickles := [p.name for p in folder.glob("adapter_model.*")]:
            raise SecurityRefusal(
                f"{folder / pickles[0]} is a pickle, which can run code when it is read",
                fix=f"Save the adapter as {WEIGHTS}.",
            )
        raise MismatchError(f"{folder} has no {WEIGHTS}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        scale = _scale(config)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise MismatchError(f"{folder} is no readable LoRA adapter: {error}") from error
    modules = dict.fromkeys(module_of(n) for n in tensors if part_of(n) == "A")
    factors = {
        m: Factors(tensors[factor_name(m, "A")], tensors[factor_name(m, "B")], scale)
        for m in modules
    }
    return Adapter(factors, {n: t for n, t in tensors.items() if part_of(n) == "head"})


def _scale(config: dict[str, Any]) -> float:
    if config["peft_type"] != "LORA" or config.get("rank_pattern") or config.get("use_dora"):
        raise ValueError("only plain LoRA with one rank for all layers is read")
    rank = config["r"]
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
