"""Adapters on disk, exactly as PEFT writes and reads them."""

# pyright: standard
# safetensors is typed in part.

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedft.core.adapters.scale import effective
from fedft.core.algebra import pad
from fedft.core.checkpoint import Head
from fedft.core.errors import MismatchError, SecurityRefusal
from fedft.core.files import MIB, Files, disk, open_plain, read_plain, write_file
from fedft.core.tasks import task_of
from fedft.core.types import PREFIX, Adapter, Delta, Factors, factor_name, module_of, part_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def save_adapter(
    folder: Path,
    adapter: Adapter,
    delta: Delta,
    *,
    task: str,
    base: str,
    revision: str | None,
    head: Head | None = None,
    beside: Mapping[str, Tensor] | None = None,
    transposed: bool = False,
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
        head: which modules the adapter's other tensors make up; None goes by their names.
        beside: name → frozen tensor that peft takes for the head's, see
            :attr:`~fedft.core.checkpoint.Head.beside`.
        transposed: whether adapted layers hold their weights as [d_in, d_out].

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
    tops = {name.removeprefix(PREFIX).split(".")[0] for name in plain.head}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_of(task).peft,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(folded),
        "modules_to_save": sorted(tops if head is None else head.modules) or None,
        "inference_mode": True,
    }
    write(folder, {**plain.map_factors(folded).tensors(), **prefixed(beside)}, config)


def prefixed(tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Tensors of the model by the names that PEFT gives them."""
    return {PREFIX + name: tensor for name, tensor in (tensors or {}).items()}


def write(folder: Path, named: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write tensors by PEFT name, and peft's configuration of them.

    Raises:
        EnvironmentFailure: the disk refused.
    """
    tensors = {name: tensor.contiguous() for name, tensor in named.items()}
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
        raise MismatchError(
            f"{folder} has no {WEIGHTS}", fix="Name the folder of an exported adapter."
        )
    try:
        scale = _scale(read_json(folder / CONFIG))
        tensors = read_tensors(folder / WEIGHTS)
        modules = dict.fromkeys(module_of(n) for n in tensors if part_of(n) == "A")
        factors = {
            m: Factors(tensors[factor_name(m, "A")], tensors[factor_name(m, "B")], scale)
            for m in modules
        }
    except UNREADABLE as error:
        raise MismatchError(
            f"{folder} is no readable LoRA adapter: {error}",
            fix="Export it again, or name the folder of another.",
        ) from error
    return Adapter(factors, {n: t for n, t in tensors.items() if part_of(n) == "head"})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a plain file in its folder."""
    found = json.loads(read_plain(path, largest=16 * MIB, within=path.parent))
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The library maps the file, and compares what its header claims with how long it is."""
    open_plain(path, within=path.parent).close()
    return load_file(path)


UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError),
    SafetensorError,
)


def _scale(config: dict[str, Any]) -> float:
    if config["peft_type"] != "LORA" or config.get("rank_pattern") or config.get("use_dora"):
        raise ValueError("only plain LoRA with one rank for all layers is read")
    rank = config["r"]
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
