"""Methods of peft other than plain LoRA: their configuration, their tensors, their start.

Everything here goes by what peft itself says of a method: which fields its configuration has, and
which parameters it trains. An adapter of such a method is a dictionary of tensors by PEFT name,
carried whole and averaged entry by entry. docs/peft-methods.md says for which of them the mean of
the tensors is the mean of the updates.
"""

# pyright: standard
# peft is typed in part.
import copy
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fedft.core import names, seeds
from fedft.core.errors import ConfigError
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import Adapter, Delta, Factors, clone

_SLOT = "default"  # peft's name of the only adapter

_PRESETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {"dora": ("LORA", {"use_dora": True})}
"""Methods that peft has as a switch of another one."""

_REFUSED: Mapping[str, str] = {
    "adalora": "every site prunes ranks of its own, so that entries of two sites do not correspond",
    "poly": "its sites learn which of several skills a task uses, not one update",
    "shadow": "it trains a second network beside the model, not tensors of the adapted layers",
    "xlora": "it mixes adapters that exist already",
}
"""Methods whose state has no mean that means anything."""

TESTED = ("dora", "vera", "ia3", "loha", "lokr")
"""The methods that the tests train, average, export and load in stock peft."""


def config_of(lora: LoraSpec, targets: Iterable[str], seed: int) -> Any:
    """Peft's configuration of ``lora.method``.

    ``rank``, ``alpha`` and ``dropout`` go into the fields that the method has for them.

    Args:
        lora: the `[lora]` table.
        targets: paths of the adapted layers.
        seed: of the run; methods with random frozen projections make them from it.

    Raises:
        ConfigError: peft has no such method, its state cannot be averaged, or it has no such option.
    """
    kind, switches = _kind(lora.method)
    known = {field.name for field in fields(kind)}
    start = {} if lora.init == "default" else {"init_lora_weights": lora.init}
    wanted: dict[str, Any] = {
        "target_modules": list(targets),
        "r": lora.rank,
        "alpha": lora.alpha,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "feedforward_modules": [],
        "projection_prng_key": seeds.derive(seed, "projection") % 2**31,
        **_dropout(lora, known),
    }
    if unknown := lora.options.keys() - known:
        near = names.near(min(unknown), known)
        raise ConfigError(
            f"[lora] options: {lora.method} has no {min(unknown)[:60]!r} in peft",
            fix=f"Nearest: {', '.join(near)}."
            if near
            else "Remove it; peft's documentation of the method lists its options.",
        )
    try:
        fitting = {name: value for name, value in wanted.items() if name in known}
        return kind(**{**fitting, **switches, **start, **lora.options})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"[lora] method = {lora.method!r}: peft says: {error}") from error


def _kind(method: str) -> tuple[Any, Mapping[str, Any]]:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    name, preset = _PRESETS.get(method, (method.upper().replace("-", "_"), {}))
    kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in kinds or name not in PeftType.__members__:
        known = ["lora", "hydralora", "rslora", "pissa", "olora", *_PRESETS, *map(str.lower, kinds)]
        near = names.near(method, known, 3)
        raise ConfigError(
            f"[lora] method = {method[:60]!r}: peft has no such method",
            fix=f"Nearest: {', '.join(near)}." if near else f"Tested are {', '.join(TESTED)}.",
        )
    kind = kinds[name]
    reason = _REFUSED.get(method)
    if "target_modules" not in {field.name for field in fields(kind)}:
        reason = "it trains tokens in front of the input, and nothing in the adapted layers"
    if reason is not None:
        raise ConfigError(
            f"[lora] method = {method!r} cannot be averaged: {reason}",
            fix=f"Choose lora, hydralora, {', '.join(TESTED)}.",
        )
    return kind, preset


def _dropout(lora: LoraSpec, known: set[str]) -> dict[str, float]:
    """Dropout on the adapter's input, which each method calls by a name of its own."""
    if not lora.dropout:
        return {}
    own = known & {"lora_dropout", f"{lora.method}_dropout"}
    if not own:
        raise ConfigError(
            f"[lora] dropout = {lora.dropout}: {lora.method} has none in peft",
            fix="Set dropout = 0.",
        )
    return dict.fromkeys(own, lora.dropout)


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
        try:
            wrapped: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(f"[lora] method = {lora.method!r}: peft says: {error}") from error
    return wrapped


def trained(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT name → parameter, of all that the method trains, in the order of the model.

    Raises:
        ConfigError: peft does not save what it trains, or trains nothing.
    """
    learned = {
        _key(name): parameter
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    paths = {_key(name): name for name in _saved(wrapped)}
    if not learned or not learned.keys() <= paths.keys():
        raise ConfigError(
            "this peft method cannot be averaged: what it trains is not what it saves",
            fix=f"Tested are {', '.join(TESTED)}.",
        )
    return {paths[key]: parameter for key, parameter in learned.items()}


def frozen(wrapped: nn.Module) -> dict[str, Tensor]:
    """PEFT name → tensor, of all that the method saves and does not train."""
    learned = trained(wrapped).keys()
    return {name: clone(t) for name, t in _saved(wrapped).items() if name not in learned}


def _saved(wrapped: nn.Module) -> Mapping[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(wrapped, save_embedding_layers=False)  # pyright: ignore


def _key(name: str) -> str:
    """What a parameter's name in memory and its name in a file have in common."""
    return name.replace(f".{_SLOT}", "").removesuffix(".weight")


def shapes(model: nn.Module, lora: LoraSpec, targets: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """PEFT name → shape of what the method trains, read off a model without weights.

    Args:
        model: of transformers; only its class and configuration are used.
        lora: the `[lora]` table.
        targets: paths of the adapted layers.

    Raises:
        ConfigError: peft needs the weights to know.
    """
    kind: Any = type(model)
    with torch.device("meta"):
        twin: Any = kind(copy.deepcopy(model.config)).requires_grad_(False)
        try:
            wrapped = injected(twin, lora, targets, seed=0)
        except NotImplementedError as error:
            raise ConfigError(
                f"[lora] method = {lora.method!r}: its shapes depend on the weights",
                fix=f"Tested are {', '.join(TESTED)}.",
            ) from error
    return {name: tuple(parameter.shape) for name, parameter in trained(wrapped).items()}


# ------------------------------------------------------------------- the start, at the server


def drawn(spec: ModelSpec, lora: LoraSpec, initial: Adapter, seed: int) -> tuple[Adapter, Delta]:
    """The adapter that training starts from, and what was taken out of the base weights for it.

    The base is loaded once, in float32 on the CPU: DoRA starts from the norms of its columns,
    PiSSA and OLoRA from its factors. Sites need not be able to repeat that to the last bit: they
    are sent the adapter, and with it the change of the base in factored form.

    Args:
        spec: the base model.
        lora: of a method of peft, or of LoRA with an ``init`` that is not the default.
        initial: what the seed gives, for the head and the order of the names.
        seed: of the run.
    """
    wrapped, _ = _loaded(spec, lora, seed)
    tensors = {name: clone(p).float() for name, p in trained(wrapped).items()}
    adapter = initial.replaced(tensors)
    if lora.init == "default":
        return adapter, {}
    return adapter, {
        module: Factors(-f.scale * f.A, f.B, 1.0) for module, f in adapter.factors.items()
    }


def frozen_tensors(
    spec: ModelSpec, lora: LoraSpec, seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """What peft needs in a saved adapter beside what was trained, and the adapted layers.

    Loads the base once in a process: VeRA's projections are made when its layers are.
    """
    return _frozen_tensors(spec.model_dump_json(), lora.model_dump_json(), seed)


@lru_cache(maxsize=1)
def _frozen_tensors(spec: str, lora: str, seed: int) -> tuple[dict[str, Tensor], list[str]]:
    table = LoraSpec.model_validate_json(lora)
    wrapped, targets = _loaded(ModelSpec.model_validate_json(spec), table, seed)
    return frozen(wrapped), targets


def _loaded(spec: ModelSpec, lora: LoraSpec, seed: int) -> tuple[nn.Module, list[str]]:
    from fedft.core import models

    base = models.load_base(spec.model_copy(update={"load_in": None}), lora, classes=2)
    return injected(base.model, lora, base.adapted, seed), list(base.adapted)
