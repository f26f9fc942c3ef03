"""How the frozen network is loaded: whole, block by block, in which numbers, from which pages."""

# pyright: standard
# transformers is typed in part; what enters from it is annotated here and strict from here on.
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedft.core import sublayers
from fedft.core.checkpoint import (
    Head,
    auto_class,
    empty,
    head_of,
    refusing,
)
from fedft.core.errors import EnvironmentFailure, MismatchError
from fedft.core.extras import need
from fedft.core.models.base import Base, block_index
from fedft.core.models.layers import block_list
from fedft.core.models.sizes import check_known, geometry
from fedft.core.models.source import cache_folder, input_encoder, resolve
from fedft.core.spec import LoraSpec, ModelSpec, Precision
from fedft.core.sublayers import Half, Layer, Sublayer
from fedft.core.tables import leave_in_file, output_of
from fedft.core.tasks import task_of
from fedft.core.text.special_tokens import SpecialTokens, special_tokens
from fedft.core.types import in_blocks


def load_base(
    spec: ModelSpec,
    lora: LoraSpec,
    classes: int,
    *,
    precision: Precision = "fp32",
    device: str = "cpu",
    lean: bool = False,
    shared: bool = False,
    eager: bool | None = None,
    names: Sequence[str] = (),
) -> Base:
    """Load the frozen base. Its head, if any, is a placeholder: an adapter brings the real one.

    Args:
        spec: which model.
        lora: which layers are adapted.
        classes: number of classes; ignored where the task has no head.
        precision: ``bf16`` holds and multiplies the base in bfloat16; ``tf32`` is float32 storage
            with TensorFloat-32 products on CUDA.
        device: torch device.
        lean: load no block yet: :meth:`Base.holding` loads those that it is asked for from the
            safetensors file, and no other block is ever in memory. On a CPU the tables of words
            stay in the file, too: see :mod:`fedft.core.tables`.
        shared: other processes on this machine load the same: make the weights pages of one file.
            They are anyway where the file has them in the dtype that is wanted; for others a
            bfloat16 copy is written once, into the user's cache.
        eager: whether attention is eager; None leaves it to the precision.
        names: of the classes, for metrics that read them.

    Attention is eager in bf16 on a CPU, where SDPA's backward pass is many times slower at short
    lengths, and SDPA elsewhere.

    Raises:
        EnvironmentFailure: the spec asks for 4 or 8 bits, and this process cannot hold them.
        MismatchError: ``lean``, and the blocks of this model cannot be told apart.
    """
    if spec.load_in is not None:
        check_quantized(spec.load_in, device)

    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    if eager is None:
        eager = precision == "bf16" and device == "cpu"
    options = _options(precision, eager=eager)
    folder = resolve(spec)
    head = head_of(spec, folder, classes)
    special = special_of(spec, folder)
    encoder = partial(input_encoder, spec, folder)
    if lean:
        check_known(geometry(spec, folder), spec)
        load = partial(_of_blocks, spec, folder, classes, head, options, device, special)
        bare = load(())
        output = output_of(bare) if task_of(spec.task).words else None
        known = leave_in_file(bare, folder if device == "cpu" else None, output)
        model = _skeleton(spec, folder, classes, bare)
        more: dict[str, Any] = {"load": load, "output": known, "names": names, "encoder": encoder}
        return Base(model, lora, spec.task, head=head, kind=spec.kind, **more)
    auto = auto_class(spec.task)
    if spec.load_in is not None:
        options |= _quantization(spec.load_in, options["dtype"], device, head)
    load = partial(
        auto.from_pretrained,
        trust_remote_code=spec.trust_remote_code,
        **options,
        **task_of(spec.task).options(classes),
    )
    if shared and precision == "bf16" and device == "cpu" and not spec.trust_remote_code:
        folder = _in_bfloat16(folder, load)
    with refusing(spec, folder):
        model = load(folder)
    task_of(spec.task).settle(model, spec.embedding, folder)
    ready = _ready(model, device, head, special)
    return Base(ready, lora, spec.task, head=head, names=names, encoder=encoder, kind=spec.kind)


def load_first(
    spec: ModelSpec,
    lora: LoraSpec,
    classes: int,
    blocks: int,
    *,
    device: str,
    eager: bool,
    names: Sequence[str] = (),
) -> Base:
    """A base of the first blocks alone, in float32: what is tried on it takes little memory.

    Args:
        spec: which model; its blocks can be told apart.
        lora: which layers are adapted, in whatever blocks.
        classes: as for :func:`load_base`.
        blocks: how many.
        device: torch device.
        eager: as for :func:`load_base`.
        names: as for :func:`load_base`.
    """
    folder = resolve(spec)
    head = head_of(spec, folder, classes)
    options = _options("fp32", eager=eager)
    special = special_of(spec, folder)
    model = _of_blocks(spec, folder, classes, head, options, device, special, range(blocks))
    alone = lora.model_copy(update={"layers": None})
    encoder = partial(input_encoder, spec, folder)
    return Base(model, alone, spec.task, head=head, names=names, encoder=encoder, kind=spec.kind)


def special_of(spec: ModelSpec, folder: Path) -> SpecialTokens | None:
    """What was decided about a model's special tokens; None where its inputs are images."""
    task = task_of(spec.task)
    return special_tokens(folder, pools=task.pools) if task.reads == "text" else None


def _options(precision: Precision, *, eager: bool) -> dict[str, Any]:
    """What transformers is told of every model."""
    return {
        "dtype": torch.bfloat16 if precision == "bf16" else torch.float32,
        # None is SDPA, for all models that have it.
        "attn_implementation": "eager" if eager else None,
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,
    }


_WORTH_SHARING = 32 << 20
"""Bytes of a weights file below which each process has its own copy."""


def _in_bfloat16(folder: Path, load: Callable[[Path], Any]) -> Path:
    """A folder with the same weights as ``load`` converts them to; ``folder`` where none is needed.

    Args:
        folder: of the model.
        load: loads a folder in bfloat16.
    """
    files = [(path, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    if sum(stat.st_size for _, stat in files) < _WORTH_SHARING or _is_bfloat16(files[0][0]):
        return folder
    known = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in files]
    key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    converted = cache_folder() / f"{folder.name}-bf16-{key}"
    if converted.exists():
        return converted
    try:
        converted.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=converted.parent, ignore_cleanup_errors=True
        ) as own:  # none to clean up once it has its name
            load(folder).save_pretrained(own)
            Path(own).rename(converted)
    except OSError:  # no room, no right to write, or another worker was first
        return converted if converted.exists() else folder
    return converted


def _is_bfloat16(weights: Path) -> bool:
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return "BF16" in kinds


def check_quantized(bits: str, device: str) -> None:
    """Refuse a base of 4 or 8 bits where it cannot be held.

    Raises:
        EnvironmentFailure: no CUDA device, or bitsandbytes is not installed.
    """
    wanted = f"[model] load-in = {bits!r}"
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise EnvironmentFailure(
            f"{wanted} needs a CUDA device, and the workers here run on the CPU",
            fix="Set [engine] gpus-per-worker on a machine with one, or leave load-in out.",
        )
    need("quantized", f"{wanted} needs it")


def _quantization(bits: str, dtype: torch.dtype, device: str, head: Head) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=bits == "4bit",
        load_in_8bit=bits == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*head.modules, "lm_head"],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _ready(model: nn.Module, device: str, head: Head, special: SpecialTokens | None) -> nn.Module:
    """Frozen, in evaluation mode, on its device; the head in float32, and what pads is said."""
    narrow = next((p.dtype for n, p in model.named_parameters() if not head.holds(n)), None)
    model.requires_grad_(False).eval()
    if not getattr(model, "is_quantized", False):  # which was put there as it was loaded
        model.to(device)
    for path in head.modules:
        module = model.get_submodule(path).float()
        module.register_forward_pre_hook(_widen)
        if path not in head.outputs and narrow == torch.bfloat16:
            module.register_forward_hook(_narrow)  # a frozen layer may come after it
    config: Any = model.config
    if special is not None:
        special.follow(model)
    elif getattr(config, "pad_token_id", 0) is None:  # rows come from elsewhere, and some pad
        ends = config.eos_token_id
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    return model


def _of_blocks(
    spec: ModelSpec,
    folder: Path,
    classes: int,
    head: Head,
    options: Mapping[str, Any],
    device: str,
    special: SpecialTokens | None,
    layers: Sequence[Layer],
) -> nn.Module:
    """The pretrained network of some blocks, or of one half of each, alone, in the order given.

    Its configuration counts as many blocks, and its weights are views of the file: those of the
    other blocks are never read, nor those of other halves. A block is what it is at its own index
    in the whole model: of some models the first one has no norm, or every other one has experts.
    """
    from safetensors import safe_open

    with torch.device("meta"):
        whole: Any = empty(spec, folder, classes)
    config = whole.config
    position = {block_index(layer): index for index, layer in enumerate(layers)}
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (the file is no mapping)
                if in_blocks(f".{name}", layers):
                    weights[_renumbered(name, position)] = file.get_tensor(name)
    kind: Any = _lacking(type(whole), layers)
    model = kind.from_pretrained(None, config=config, state_dict=weights, **options)
    task_of(spec.task).settle(model, spec.embedding, folder)
    try:
        model.config.num_hidden_layers = len(layers)  # not before: some scale what they draw by it
        if kinds := getattr(config, "layer_types", None):
            model.config.layer_types = [kinds[block_index(layer)] for layer in layers]
    except (AttributeError, NotImplementedError):  # a depth that follows from something else
        check_known(None, spec)
    return _ready(model, device, head, special)


def _lacking(kind: type[nn.Module], layers: Sequence[Layer]) -> type[nn.Module]:
    """``kind`` with the blocks of ``layers`` alone, and an identity for every child of other halves.

    transformers would make up at random what a file does not give.
    """

    def build(self: nn.Module, *args: Any, **options: Any) -> None:
        kind.__init__(self, *args, **options)
        blocks = block_list(self)
        if blocks is None:
            raise MismatchError(
                f"the blocks of {kind.__name__} cannot be told from its other layers",
                fix="Grant the memory of the whole model.",
            )
        held = [blocks[block_index(layer)] for layer in layers]
        for layer, block in zip(layers, held, strict=True):
            if isinstance(layer, Sublayer):
                lost: Half = "feed-forward" if layer.half == "attention" else "attention"
                for name in sublayers.children(block, lost):
                    setattr(block, name, nn.Identity())
        blocks._modules.clear()
        blocks.extend(held)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _renumbered(name: str, position: Mapping[int, int]) -> str:
    return re.sub(r"\.(\d+)\.", lambda found: f".{position[int(found[1])]}.", name, count=1)


def _skeleton(spec: ModelSpec, folder: Path, classes: int, bare: nn.Module) -> nn.Module:
    """``bare``, a model without blocks, with all blocks of the configuration on the meta device."""
    with torch.device("meta"):
        whole: Any = empty(spec, folder, classes)
    blocks, slot = block_list(whole), block_list(bare)
    if blocks is None or slot is None:
        raise MismatchError(
            f"the blocks of {type(whole).__name__} cannot be told from its other layers",
            fix="Grant the memory of the whole model.",
        )
    config: Any = bare.config
    config.num_hidden_layers = len(blocks)
    if hasattr(whole.config, "layer_types"):
        config.layer_types = whole.config.layer_types
    for module in blocks.modules():
        if hasattr(module, "config"):
            module.config = config  # one object for all, as in a model that is loaded whole
    slot.extend(blocks.requires_grad_(False).eval())
    return bare


def _widen(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A head stays in float32 also where the base is bfloat16."""
    return tuple(x.float() if x.dtype == torch.bfloat16 else x for x in inputs)


def _narrow(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """What a head in the middle of a model gives goes on as the base computes."""
    return output.to(torch.bfloat16)


def frozen_values(spec: ModelSpec, classes: int, head: Head) -> dict[str, Tensor]:
    """The base's own tensors that an exported adapter holds beside its head, by name.

    They are read from the checkpoint; of most models there are none.
    """
    if not head.beside:
        return {}
    folder = resolve(spec)
    with refusing(spec, folder):
        model = auto_class(spec.task).from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=spec.trust_remote_code,
            **task_of(spec.task).options(classes),
        )
    return {name: model.get_parameter(name).detach().clone() for name in head.beside}
