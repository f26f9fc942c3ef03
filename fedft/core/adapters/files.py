"""Adapters on disk, exactly as PEFT writes and reads them."""

# pyright: standard
# safetensors is typed in part.

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedft.core.adapters import hydra, peft
from fedft.core.adapters.lora import effective, scale_of
from fedft.core.algebra import pad
from fedft.core.checkpoint import Head
from fedft.core.errors import MismatchError, SecurityRefusal
from fedft.core.files import MIB, Files, disk, open_plain, read_plain, write_file
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import PREFIX, Adapter, Delta, Factors, factor_name, module_of, part_of

PEFT_TASK: dict[str, str | None] = {
    "classification": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
    "image-classification": None,
}
"""Our task → peft's ``task_type``."""

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
        "task_type": PEFT_TASK[task],
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
    _write(folder, {**plain.map_factors(folded).tensors(), **_prefixed(beside)}, config)


def _prefixed(tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    return {PREFIX + name: tensor for name, tensor in (tensors or {}).items()}


def save_whole(
    folder: Path,
    adapter: Adapter,
    *,
    model: ModelSpec,
    lora: LoraSpec,
    base: str,
    seed: int,
    targets: Sequence[str],
    frozen: Mapping[str, Tensor],
    head: Head,
    beside: Mapping[str, Tensor],
) -> None:
    """Write an adapter of another peft method, with peft's own configuration of it.


    Args:
        folder: created if needed.
        adapter: whose tensors are carried whole.
        model: the `[model]` table.
        lora: the `[lora]` table.
        base: name or folder of the base model, for the reader.
        seed: run seed.
        targets: paths of the adapted layers.
        frozen: what the method needs and does not train, such as VeRA's projections.
        head: as for :func:`save_adapter`.
        beside: likewise.

    Raises:
        EnvironmentFailure: the disk refused.
    """
    own = peft.config_of(lora, targets, seed).to_dict()
    config = {
        **{key: sorted(v) if isinstance(v, set) else v for key, v in own.items()},
        "task_type": PEFT_TASK[model.task],
        "base_model_name_or_path": base,
        "revision": model.revision,
        "modules_to_save": sorted(head.modules) or None,
        "inference_mode": True,
    }
    _write(folder, {**adapter.head, **frozen, **_prefixed(beside)}, config)


MIXTURE = "mixture"
"""File name, without its ending, of all heads and routers of a HydraLoRA adapter."""


def save_mixture(
    folder: Path,
    adapter: Adapter,
    *,
    model: ModelSpec,
    lora: LoraSpec,
    base: str,
    head: Head,
    beside: Mapping[str, Tensor],
    classes: int,
) -> None:
    """Write a HydraLoRA adapter: what stock peft can load of it, and all of it.

    ``folder`` itself is a LoRA adapter with the uniform mean of the heads, ``head-<i>`` one with
    head i alone; ``mixture.safetensors`` and ``mixture.json`` hold every head and the routers, for
    :func:`fedft.load_mixture`. No LoRA adapter can hold gates that depend on the input.

    Args:
        folder: created if needed.
        adapter: of HydraLoRA.
        model: the `[model]` table.
        lora: the `[lora]` table.
        base: name or folder of the base model, for the reader.
        head: as for :func:`save_adapter`.
        beside: likewise.
        classes: number of classes.

    Raises:
        EnvironmentFailure: the disk refused.
    """
    scale, count = scale_of(lora, adapter.rank), hydra.head_count(adapter)
    about: dict[str, Any] = {"task": model.task, "base": base, "revision": model.revision}
    extra: dict[str, Any] = {"head": head, "beside": beside}
    save_adapter(folder, hydra.mixed(adapter, scale, [1 / count] * count), {}, **about, **extra)
    for i in range(count):
        alone = hydra.mixed(adapter, scale, [float(i == j) for j in range(count)])
        save_adapter(folder / f"head-{i}", alone, {}, **about, **extra)
    config = {**about, "heads": count, "rank": adapter.rank, "scale": scale, "classes": classes}
    tensors = {name: t.contiguous() for name, t in adapter.head.items()}
    write_file(folder / f"{MIXTURE}.safetensors", save(tensors, {"format": "pt"}))
    write_file(folder / f"{MIXTURE}.json", json.dumps(config, indent=2).encode() + b"\n")


def load_mixture(folder: Path) -> tuple[Adapter, dict[str, Any]]:
    """Read what :func:`save_mixture` wrote: the adapter, and ``task, base, revision, heads, rank, scale, classes``.

    Raises:
        MismatchError: it is no folder of a HydraLoRA adapter.
    """
    try:
        config = _read_json(folder / f"{MIXTURE}.json")
        adapter = Adapter({}, _read_tensors(folder / f"{MIXTURE}.safetensors"))
        scaled = float(config["scale"]) > 0 and hydra.head_count(adapter) == config["heads"] > 0
    except _UNREADABLE as error:
        raise MismatchError(
            f"{folder} holds no readable HydraLoRA mixture: {error}",
            fix="Export it from a run with [lora] method = 'hydralora'.",
        ) from error
    if not scaled:
        raise MismatchError(f"{folder}: mixture.json does not describe mixture.safetensors")
    return adapter, config


def _write(folder: Path, named: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
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
        scale = _scale(_read_json(folder / CONFIG))
        tensors = _read_tensors(folder / WEIGHTS)
        modules = dict.fromkeys(module_of(n) for n in tensors if part_of(n) == "A")
        factors = {
            m: Factors(tensors[factor_name(m, "A")], tensors[factor_name(m, "B")], scale)
            for m in modules
        }
    except _UNREADABLE as error:
        raise MismatchError(
            f"{folder} is no readable LoRA adapter: {error}",
            fix="Export it again, or name the folder of another.",
        ) from error
    return Adapter(factors, {n: t for n, t in tensors.items() if part_of(n) == "head"})


def _read_json(path: Path) -> dict[str, Any]:
    found = json.loads(read_plain(path, largest=16 * MIB, within=path.parent))
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return found


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The library maps the file, and compares what its header claims with how long it is."""
    open_plain(path, within=path.parent).close()
    return load_file(path)


_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError),
    SafetensorError,
)


def _scale(config: dict[str, Any]) -> float:
    if config["peft_type"] != "LORA" or config.get("rank_pattern") or config.get("use_dora"):
        raise ValueError("only plain LoRA with one rank for all layers is read")
    rank = config["r"]
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
