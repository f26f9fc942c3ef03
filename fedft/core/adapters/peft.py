"""Methods of peft other than plain LoRA: their configuration, their tensors, their start.

Everything here goes by what peft itself says of a method: which fields its configuration has, and
which parameters it trains. An adapter of such a method is a dictionary of tensors by PEFT name,
carried whole and averaged entry by entry. :mod:`fedft.core.adapters.tuners` says which methods and fields
are refused, and for which the mean of the tensors is the mean of the updates.
"""

# pyright: standard
# peft is typed in part.
import copy
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedft.core import names as spelling
from fedft.core import seeds
from fedft.core.adapters.base import Export, Family, Modules, Shapes
from fedft.core.adapters.files import prefixed, write
from fedft.core.adapters.tuners import PROMPTS, REFUSED, TUNERS, canonical, check_option, tuner_of
from fedft.core.errors import ConfigError, EnvironmentFailure, FedftError
from fedft.core.spec import LoraSpec
from fedft.core.tasks import task_of
from fedft.core.types import clone

_PRESETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {"dora": ("LORA", {"use_dora": True})}
"""Methods that peft has as a switch of another one."""

_UNSEEDED = "generator_seed"
"""A field named as a seed whose draws belong to training: they come from the round's own stream."""


def config_of(lora: LoraSpec, targets: Iterable[str] | None, seed: int) -> Any:
    """Peft's configuration of ``lora.method``.

    ``rank``, ``alpha`` and ``dropout`` go into the fields that the method has for them; fields that
    are seeds are derived from the run's.

    Args:
        lora: the `[lora]` table.
        targets: paths of the adapted layers; None where no model is at hand yet.
        seed: of the run; methods with random frozen tensors make them from it.

    Raises:
        ConfigError: peft has no such method, its state cannot be averaged, or an option of it is
            unknown, refused or names no adapted layer.
        EnvironmentFailure: a package that the method needs is not installed.
    """
    kind, switches = _kind(lora.method)
    known = {field.name for field in fields(kind)}
    start = {} if lora.init == "default" else {"init_lora_weights": lora.init}
    wanted: dict[str, Any] = {
        "target_modules": ["query"] if targets is None else list(targets),
        "r": lora.rank,
        **dict.fromkeys(("alpha", "lora_alpha", f"{_field(lora.method)}_alpha"), lora.alpha),
        "use_rslora": lora.rslora,
        "feedforward_modules": [],
        "progressbar": False,
        **{
            name: seeds.derive(seed, "projection") % 2**31
            for name in known
            if name.endswith(("seed", "prng_key")) and name != _UNSEEDED
        },
        **_dropout(lora, known),
    }
    options = _options(lora, known, targets)
    unfilled = tuner_of(lora.method).unfilled
    fitting = {n: value for n, value in wanted.items() if n in known and n not in unfilled}
    return _made(lora, lambda: kind(**{**fitting, **switches, **start, **options}))


def _field(method: str) -> str:
    return canonical(method).replace("-", "_")


def _kind(method: str) -> tuple[Any, Mapping[str, Any]]:
    from peft import PeftType, PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    name, preset = _PRESETS.get(method, (_field(method).upper(), {}))
    kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in kinds or name not in PeftType.__members__:
        names = ["lora", "hydralora", "rslora", "pissa", "olora", *_PRESETS]
        names += [canonical(kind) for kind in kinds]
        near = spelling.near(method, names, 3)
        raise ConfigError(
            f"[lora] method = {method[:60]!r}: peft has no such method",
            fix=f"Nearest: {', '.join(near)}." if near else f"Tested are {', '.join(TUNERS)}.",
        )
    kind = kinds[name]
    reason = PROMPTS if issubclass(kind, PromptLearningConfig) else REFUSED.get(canonical(method))
    if reason is None and "target_modules" not in {field.name for field in fields(kind)}:
        reason = "it adapts no layers that can be named"
    if reason is not None:
        raise ConfigError(
            f"[lora] method = {method!r} cannot be averaged: {reason}",
            fix=f"Choose lora, hydralora, {', '.join(sorted(TUNERS.keys() - {'lora'}))}.",
        )
    return kind, preset


def _options(lora: LoraSpec, known: set[str], targets: Iterable[str] | None) -> dict[str, Any]:
    """`[lora] options`, checked; names of layers in them as paths."""
    if unknown := lora.options.keys() - known:
        near = spelling.near(min(unknown), known)
        raise ConfigError(
            f"[lora] options: {lora.method} has no {min(unknown)[:60]!r} in peft",
            fix=f"Nearest: {', '.join(near)}."
            if near
            else "Remove it; peft's documentation of the method lists its options.",
        )
    for name, value in lora.options.items():
        check_option(_field(lora.method), name, value)
    options: dict[str, Any] = dict(lora.options)
    layers = None if targets is None else list(targets)
    for name, value in options.items():
        if name.endswith("_pattern") and isinstance(value, dict) and layers is not None:
            for pattern in value:
                if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in layers):
                    raise _unmatched(name, pattern, layers)
    if "feedforward_modules" in options:
        options["feedforward_modules"] = _feedforward(options["feedforward_modules"], layers)
    return options


def _feedforward(names: Any, layers: Sequence[str] | None) -> list[str]:
    """Paths of the adapted layers whose inputs IA3 scales, not their outputs."""
    if layers is None:
        return []
    wanted = [names] if isinstance(names, str) else list(names)
    found = {n: [path for path in layers if path == n or path.endswith(f".{n}")] for n in wanted}
    for name, paths in found.items():
        if not paths:
            raise _unmatched("feedforward_modules", name, layers)
    return sorted({path for paths in found.values() for path in paths})


def _unmatched(option: str, name: str, layers: Sequence[str]) -> ConfigError:
    near = spelling.near(name, layers) or layers[:2]
    return ConfigError(
        f"[lora] options: {option} names {name!r}, which no adapted layer is called",
        fix=f"Adapted are, for example, {', '.join(near)}.",
    )


def _dropout(lora: LoraSpec, known: set[str]) -> dict[str, float]:
    """Dropout on the adapter's input, which each method calls by a name of its own."""
    if not lora.dropout:
        return {}
    own = known & {"lora_dropout", f"{_field(lora.method)}_dropout"}
    own -= tuner_of(lora.method).unfilled
    if not own:
        raise ConfigError(
            f"[lora] dropout = {lora.dropout}: {lora.method} has none in peft",
            fix="Set dropout = 0.",
        )
    return dict.fromkeys(own, lora.dropout)


def _made(lora: LoraSpec, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, whatever peft raises or warns as an error of ours.

    A warning that names an option is peft changing or ignoring what the user asked for.
    """
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            made = make()
        except FedftError:
            raise
        except ImportError as error:
            package = re.search(r"pip install ([\w.-]+)", str(error)) or re.search(
                r"package '([\w.-]+)'", str(error)
            )
            raise EnvironmentFailure(
                f"[lora] method = {lora.method!r} needs a package that is not installed: {error}",
                fix=f"pip install {package[1]}" if package else "Install it.",
            ) from error
        except Exception as error:  # each tuner raises what it likes
            raise ConfigError(
                f"[lora] method = {lora.method!r}: peft says: {error or type(error).__name__}"
            ) from error
    for warning in heard:
        for name in lora.options:
            if re.search(rf"\b{re.escape(name)}\b", text := str(warning.message)):
                raise ConfigError(f"[lora] options: {name} is not followed; peft says: {text}")
    return made


# ------------------------------------------------------------------------- tensors in a model


def injected(model: nn.Module, lora: LoraSpec, targets: Iterable[str], seed: int) -> nn.Module:
    """The model with the method's layers in it, in place; what is random comes from the seed.

    Raises:
        ConfigError: peft cannot adapt these layers so.
    """
    from peft import get_peft_model

    config = config_of(lora, targets, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "peft"))
        return _made(lora, lambda: get_peft_model(model, config))  # pyright: ignore


def trained(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT name → parameter, of all that the method trains, in the order of the model.

    Raises:
        ConfigError: peft does not save what it trains, or trains nothing.
    """
    learned = [p for p in wrapped.parameters() if p.requires_grad]
    names: dict[int, list[str]] = {}
    for name, tensor in _saved(wrapped).items():
        names.setdefault(id(tensor), []).append(name)
    found = [names.get(id(parameter), []) for parameter in learned]
    if not learned:
        raise ConfigError(
            "this peft method finds nothing to train in the layers that are adapted",
            fix="Name other layers in [lora] target-modules.",
        )
    if any(len(saved) != 1 for saved in found):
        raise ConfigError(
            "this peft method cannot be averaged: what it trains is not what it saves",
            fix=f"Tested are {', '.join(TUNERS)}.",
        )
    return {saved[0]: parameter for saved, parameter in zip(found, learned, strict=True)}


def frozen(wrapped: nn.Module) -> dict[str, Tensor]:
    """PEFT name → tensor, of all that the method saves and does not train."""
    learned = trained(wrapped).keys()
    return {name: clone(t) for name, t in _saved(wrapped).items() if name not in learned}


def _saved(wrapped: nn.Module) -> Mapping[str, Tensor]:
    """What peft would write, parameters as the very objects that the model has."""
    from peft import get_peft_model_state_dict

    state = wrapped.state_dict(keep_vars=True)
    return get_peft_model_state_dict(wrapped, state_dict=state, save_embedding_layers=False)  # pyright: ignore


def shapes(model: nn.Module, lora: LoraSpec, targets: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """PEFT name → shape of what the method trains, read off a model without weights.

    A method that looks at weights as it starts gets the adapted layers alone on the CPU, with
    numbers that mean nothing; all else stays on the meta device.

    Args:
        model: of transformers; only its class and configuration are used.
        lora: the `[lora]` table.
        targets: paths of the adapted layers.

    Raises:
        ConfigError: peft cannot adapt these layers so.
    """
    paths = list(targets)
    try:
        with torch.device("meta"):
            wrapped = injected(_empty_twin(model), lora, paths, seed=0)
    except ConfigError:
        twin = _empty_twin(model)
        for path in paths:
            _realise(twin.get_submodule(path))
        wrapped = injected(twin, lora, paths, seed=0)
    return {name: tuple(parameter.shape) for name, parameter in trained(wrapped).items()}


def _empty_twin(model: nn.Module) -> nn.Module:
    kind: Any = type(model)
    with torch.device("meta"):
        twin: nn.Module = kind(copy.deepcopy(model.config)).requires_grad_(False)
    return twin


def _realise(layer: nn.Module) -> None:
    """Give a layer on the meta device memory on the CPU, and some numbers."""
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            numbers = torch.Generator().manual_seed(0)
            parameter.normal_(std=0.02, generator=numbers)


class Peft(Family):
    """Whatever peft trains in the adapted layers, carried whole and averaged entry by entry."""

    name = "peft"
    bounded = False  # a method of peft bounds its own rank, if it has one

    def check(self, lora: LoraSpec) -> None:
        """Peft has the method, and it takes its options.

        Raises:
            ConfigError: see :func:`config_of`.
            EnvironmentFailure: a package that the method needs is not installed.
        """
        config_of(lora, targets=None, seed=0)

    def draws(self, lora: LoraSpec) -> bool:
        """By peft, always."""
        return True

    def from_weights(self, lora: LoraSpec) -> bool:
        """As the table of methods says."""
        return tuner_of(lora.method).from_weights

    def shapes(self, model: nn.Module, lora: LoraSpec, modules: Modules) -> Shapes:
        """As peft makes them, on a model without weights."""
        return shapes(model, lora, modules)

    def initial(self, shapes: Shapes, seed: int) -> dict[str, Tensor]:
        """Zeros; all tensors are drawn at the server and travel."""
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    def save(self, folder: Path, export: Export) -> None:
        """Write peft's own configuration of the method, and all that the method needs.

        What it needs and does not train, such as VeRA's projections, is written too.
        """
        frozen, targets = export.frozen()
        own = config_of(export.lora, targets, export.seed).to_dict()
        config = {
            **{key: sorted(v) if isinstance(v, set) else v for key, v in own.items()},
            "task_type": task_of(export.model.task).peft,
            "base_model_name_or_path": export.model.source,
            "revision": export.model.revision,
            "modules_to_save": sorted(export.head.modules) or None,
            "inference_mode": True,
        }
        write(folder, {**export.adapter.head, **frozen, **prefixed(export.beside)}, config)
