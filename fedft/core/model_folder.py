"""What a model's folder holds, looked at before any library reads it.

Libraries find out late, with a traceback of their own, or not at all: a pipe is waited on for ever,
a torn file is read to its end, an adapter that lies beside a model is loaded unasked. Here every file
is looked at for what it claims to be; of the weights only the headers are read.
"""

import json
import math
import stat
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from fedft.core.errors import MismatchError, SecurityRefusal

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
_READ = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "chat_templates/*.jinja")
"""What a library may open in a model's folder."""

_LARGEST_CONFIG = 16 << 20
_LARGEST_HEADER = 100_000_000
"""Bytes; safetensors itself allows no more."""

_LARGEST_TEXT = 256 << 20
"""Bytes of a tokenizer; large vocabularies take 35 MB."""

_WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types that a model is fine-tuned from → bytes a number."""

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers")


def check(folder: Path) -> Mapping[str, Any]:
    """The configuration of a model whose files are what they say they are.

    Args:
        folder: of the model.

    Raises:
        MismatchError: a file is missing, torn, of another kind, or belongs to something else.
        SecurityRefusal: the weights are pickles alone, or lie outside of the folder.
    """
    return _checked(folder, tuple(_stamps(folder)))


@lru_cache(maxsize=16)
def _checked(folder: Path, _: object) -> Mapping[str, Any]:
    for path in _files(folder):
        _check_regular(path)
    if (folder / ADAPTER).exists():
        _refuse_adapter(folder)
    config = _config(folder)
    _check_config(folder, config)
    names = [name for path in _weights(folder) for name in _check_weights(path)]
    _check_depth(folder, config, len(names))
    return config


def _stamps(folder: Path) -> Iterator[tuple[object, ...]]:
    """What changes where any file does."""
    for path in _files(folder):
        try:
            found = path.stat()
        except OSError as error:
            yield str(path), error.errno
        else:
            yield str(path), found.st_mode, found.st_size, found.st_mtime_ns


def _files(folder: Path) -> list[Path]:
    return sorted(path for pattern in _READ for path in folder.glob(pattern))


def _check_regular(path: Path) -> None:
    try:
        found = path.stat()
        mode = found.st_mode
    except OSError as error:
        raise MismatchError(
            f"{path} cannot be read: {error.strerror}",
            fix="Put the file itself there, or a link to it that leads somewhere.",
        ) from error
    if stat.S_ISDIR(mode) and not path.match("*.safetensors") and path.name != CONFIG:
        return  # not what a library opens
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise MismatchError(f"{path} is {kind}, not a file", fix="Put the file itself there.")
    if path.suffix != ".safetensors" and found.st_size > _LARGEST_TEXT:
        raise MismatchError(
            f"{path} has {found.st_size:,} bytes, and {_LARGEST_TEXT:,} is the most that can be meant",
            fix="Fetch the file anew.",
        )


def read_json(path: Path) -> Any:
    """What a JSON file of a model holds.

    Raises:
        MismatchError: it cannot be read, or is not JSON.
    """
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MismatchError(
            f"{path} cannot be read: {error.strerror}", fix="Make it readable."
        ) from error
    except (ValueError, RecursionError) as error:  # JSON or UTF-8
        raise MismatchError(
            f"{path} is not JSON: {_words(error)}",
            fix="Fetch the file anew: it is torn or was edited.",
        ) from error


def _words(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return "a number has too many digits" if "integer string" in str(error) else str(error)


def _table(found: Any) -> Mapping[str, Any]:
    """What JSON gave where it is a table; an empty one otherwise."""
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else {}


def _refuse_adapter(folder: Path) -> None:
    base = _table(read_json(folder / ADAPTER)).get("base_model_name_or_path")
    if (folder / CONFIG).exists():
        raise MismatchError(
            f"beside the model in {folder} lies {ADAPTER}: transformers would load that adapter with "
            "the model, unasked",
            fix=f"Move {ADAPTER} and adapter_model.safetensors to a folder of their own.",
        )
    raise MismatchError(
        f"{folder} holds a PEFT adapter, not a model",
        fix="Set [model] source to its base model"
        + (f", {base!r}." if isinstance(base, str) and base else ".")
        + " To start from the adapter, merge it into the base first.",
    )


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
        raise MismatchError(
            f"{folder} has no {CONFIG}" + (f", only {gguf.name}" if gguf else ""),
            fix="Name the folder of a model as save_pretrained of transformers writes it.",
        )
    config: Any = read_json(path)
    if not isinstance(config, dict):
        raise MismatchError(
            f"{path} holds {'a list' if isinstance(config, list) else 'no table'} where a table is expected",
            fix="Fetch the file anew.",
        )
    return cast("Mapping[str, Any]", config)


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise MismatchError(
            f"{folder / CONFIG} does not say what the model is: model_type is {kind!r}",
            fix="Fetch the file anew, or add the model_type of its architecture.",
        )
    if (quantised := config.get("quantization_config")) is not None:
        method = str(_table(quantised).get("quant_method", "")) or "an unnamed method"
        raise MismatchError(
            f"the weights in {folder} are quantised already ({method}): updates cannot be added to them, "
            "nor can peft load them alike everywhere",
            fix="Name the checkpoint that was quantised; [model] load-in holds it in few bits.",
        )


def _check_depth(folder: Path, config: Mapping[str, Any], tensors: int) -> None:
    for name in _DEPTHS:
        depth = config.get(name)
        if isinstance(depth, int) and depth > max(tensors, 1):
            raise MismatchError(
                f"{folder / CONFIG} says {name} = {depth:,}, and the weights hold {tensors} tensors",
                fix=f"Put the {CONFIG} back that belongs to these weights.",
            )


# ---------------------------------------------------------------------------------- weights


def _weights(folder: Path) -> list[Path]:
    """The files that transformers would read, each of which is there."""
    found = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    if (folder / "model.safetensors").exists():
        return found
    if index.exists():
        return [folder / name for name in _indexed(index)]
    if found:
        raise MismatchError(
            f"{folder} has {found[0].name}, and neither model.safetensors nor {INDEX}, which says what lies "
            "where",
            fix="Fetch the checkpoint anew, all files of it.",
        )
    pickles = [p for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern)]
    if pickles:
        raise SecurityRefusal(
            f"{folder} has no .safetensors weights; pickled weights ({pickles[0].name}) can run code",
            fix="Convert the model with save_pretrained(..., safe_serialization=True).",
        )
    raise MismatchError(
        f"{folder} has no weights: no model.safetensors",
        fix="Fetch the checkpoint anew, all files of it.",
    )


def _indexed(index: Path) -> list[str]:
    table = _table(_table(read_json(index)).get("weight_map"))
    if not table:
        raise MismatchError(f"{index} has no weight_map", fix="Fetch the file anew.")
    files = sorted({str(name) for name in table.values()})
    for name in files:
        if Path(name).name != name or name in ("", ".", ".."):
            raise SecurityRefusal(
                f"{index} names the file {name!r}, outside of the model's folder",
                fix="Fetch the checkpoint anew, from a source you trust.",
            )
    if absent := [name for name in files if not (index.parent / name).exists()]:
        raise MismatchError(
            f"{index.parent} lacks {', '.join(absent[:3])}, "
            f"{len(absent)} of {len(files)} files of the weights",
            fix="Fetch the missing files.",
        )
    return files


def _check_weights(path: Path) -> list[str]:
    """Names of the tensors in a file whose header agrees with its size."""
    header, start = _header(path)
    size, end = path.stat().st_size, start
    for name, about in header.items():
        if name == "__metadata__":
            continue
        kind, shape, (first, last) = about["dtype"], about["shape"], about["data_offsets"]
        if kind not in _WIDTH and name.rpartition(".")[2] in ("weight", "bias"):
            raise MismatchError(
                f"{name} in {path} is {kind}, which no model is fine-tuned from",
                fix="Use a checkpoint in float32, bfloat16 or float16.",
            )
        if kind in _WIDTH and last - first != _WIDTH[kind] * math.prod(shape):
            raise MismatchError(
                f"{name} in {path} takes {last - first} bytes, and its shape {shape} says otherwise",
                fix="Fetch the file anew.",
            )
        end = max(end, start + last)
    if end != size:
        raise MismatchError(
            f"{path} has {size:,} bytes, and its header says {end:,}: it is torn",
            fix="Fetch the file anew.",
        )
    return [name for name in header if name != "__metadata__"]


def _header(path: Path) -> tuple[Mapping[str, Any], int]:
    """The header of a safetensors file, and where the numbers begin."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if first.startswith(b"version "):
                raise MismatchError(
                    f"{path} is a pointer of Git LFS, not the weights",
                    fix="In that repository: git lfs pull",
                )
            if len(first) < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"{size:,} bytes cannot hold the header that it announces")
            header: Any = json.loads(file.read(length))
        for name, about in header.items():
            if name != "__metadata__":
                first_byte, last_byte = about["data_offsets"]
                if not 0 <= first_byte <= last_byte or min([*about["shape"], 0]) < 0:
                    raise ValueError(f"{name} lies nowhere")
                str(about["dtype"])
    except OSError as error:
        raise MismatchError(
            f"{path} cannot be read: {error.strerror}", fix="Make it readable."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MismatchError(
            f"{path} is no safetensors file: {_words(error).splitlines()[0]}",
            fix="Fetch the file anew: it is torn or of another kind.",
        ) from error
    return header, 8 + length
