"""What is known here of peft's tuners, and of the fields of their configurations.

One row a tuner: whether a weighted mean of its tensors is the mean of its updates, which layers it
adapts, what it takes from the base weights. One row a refusal: of a whole tuner, or of one field.
A tuner or a field that peft adds later is in no row: it is tried as the others are, and the test
over all of them asks for a row. docs/peft-methods.md has the equations.
"""

# pyright: standard
# torch.nn's modules are typed in part.
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from fedft.core import names as spelling
from fedft.core.errors import ConfigError

LayerKind = Literal["linear", "norm"]


@dataclass(frozen=True)
class Tuner:
    """One tuner of peft.

    Attributes:
        exact: whether, at the method's defaults and for every input, the mean of sites' adapters
            changes a layer by the mean of the sites' changes: the change is affine in what trains.
        layers: what it adapts.
        from_weights: whether something that it keeps frozen is worked out from the base weights,
            and made again by each site.
        unfilled: fields whose name `[lora]` would fill and that mean something else here.
        refused: option → why it is not passed on to this one.
        inexact_with: option → a value with which an exact method no longer is.
    """

    exact: bool = False
    layers: LayerKind = "linear"
    from_weights: bool = False
    unfilled: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    inexact_with: Mapping[str, Any] = field(default_factory=dict[str, Any])


TUNERS: Mapping[str, Tuner] = {
    "beft": Tuner(exact=True),
    "boft": Tuner(),
    "c3a": Tuner(exact=True),
    "deft": Tuner(),
    "delora": Tuner(from_weights=True),
    "dora": Tuner(),
    "fourierft": Tuner(exact=True),
    "frod": Tuner(exact=True, from_weights=True),
    "glora": Tuner(),
    "gralora": Tuner(),
    "hira": Tuner(),
    "hra": Tuner(),
    "ia3": Tuner(exact=True),
    "lily": Tuner(),
    "ln-tuning": Tuner(exact=True, layers="norm"),
    "loha": Tuner(),
    "lokr": Tuner(),
    "lora": Tuner(),
    "miss": Tuner(exact=True),
    "oft": Tuner(
        unfilled=frozenset({"r"}),
        refused={"module_dropout": "peft does not apply it to linear layers"},
    ),
    "osf": Tuner(from_weights=True),
    "peanut": Tuner(),
    "psoft": Tuner(from_weights=True),
    "pvera": Tuner(),
    "randlora": Tuner(),
    "road": Tuner(),
    "shira": Tuner(exact=True),
    "supertuning": Tuner(
        exact=True,
        from_weights=True,
        unfilled=frozenset({"r", "lora_alpha", "lora_dropout"}),
        inexact_with={"r": 2},
    ),
    "tinylora": Tuner(
        exact=True,
        from_weights=True,
        refused={"init_weights": "with false peft leaves memory as it finds it"},
    ),
    "unilora": Tuner(),
    "vblora": Tuner(),
    "vera": Tuner(),
    "waveft": Tuner(exact=True),
}
"""Method, spelled with hyphens → what is known of it."""

REFUSED: Mapping[str, str] = {
    "adalora": "every client prunes ranks of its own, so that entries of two clients do not correspond",
    "adamss": "it clusters the rows of each weight, so that the shapes of what it trains are known "
    "only where the weights are",
    "adaption-prompt": "it trains tokens in front of the attention, nothing in the adapted layers",
    "poly": "its clients learn which of several skills a task uses, not one update",
    "shadow": "it trains a second network beside the model, not tensors of the adapted layers",
    "trainable-tokens": "it trains rows of the word table, and adapted layers are linear here",
    "xlora": "it mixes adapters that exist already",
}
"""Methods whose state has no mean that means anything, or that cannot be carried; and why."""

PROMPTS = "it trains tokens in front of the input, and nothing in the adapted layers"
"""Why every method is refused that peft calls prompt learning."""


def canonical(method: str) -> str:
    """The spelling of a method in :data:`TUNERS`: small letters, hyphens."""
    return method.lower().replace("_", "-")


def tuner_of(method: str) -> Tuner:
    """What is known of a method; of one that peft has and this table lacks, the cautious default."""
    return TUNERS.get(canonical(method), Tuner())


# -------------------------------------------------------------------- fields of configurations

_OWN: Mapping[str, str] = {
    "r": "[lora] rank",
    "alpha": "[lora] alpha",
    "lora_alpha": "[lora] alpha",
    "lora_dropout": "[lora] dropout",
    "use_rslora": "[lora] rslora",
    "target_modules": "[lora] target-modules",
    "exclude_modules": "[lora] exclude-modules",
    "layers_to_transform": "[lora] layers",
    "modules_to_save": "[lora] head",
}
"""Field of peft → the key of ours that fills it."""

_WRITTEN = frozenset(
    [
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
    ]
)
"""Fields that are about the exported file, which is written with them."""

_FIELDS: Mapping[str, tuple[str, str]] = {
    "layers_pattern": (
        "blocks are counted by the first number in a layer's path",
        "name the layers by a regular expression, [lora] target-modules = 'REGEX'",
    ),
    "trainable_token_indices": ("it trains rows of the word table", "leave it out"),
    "target_parameters": (
        "it adapts parameters that are no layer",
        "name linear layers in [lora] target-modules",
    ),
    "layer_replication": (
        "it changes the number of blocks",
        "repeat the blocks in the model itself and save that",
    ),
    "ensure_weight_tying": ("it is about tied word tables, which are not adapted", "leave it out"),
    "megatron_config": ("layers split by Megatron are not trained here", "leave it out"),
    "megatron_core": ("layers split by Megatron are not trained here", "leave it out"),
    "runtime_config": ("it is about how one process computes, not what", "leave it out"),
    "loftq_config": ("it quantises the base as it starts", "use [model] load-in"),
    "use_qalora": ("it is for bases in GPTQ, which are not loaded here", "leave it out"),
    "qalora_group_size": ("it is for bases in GPTQ, which are not loaded here", "leave it out"),
    "eva_config": ("it starts from data, which the server does not have", "use [lora] init"),
    "corda_config": ("it starts from data, which the server does not have", "use [lora] init"),
    "lora_ga_config": ("it starts from data, which the server does not have", "use [lora] init"),
    "velora_config": ("its gradients depend on earlier batches of a client", "leave it out"),
    "kasa_config": (
        "it cuts the base weights at every client, and needs a loss of its own",
        "leave it out",
    ),
    "monteclora_config": (
        "it draws its factors at random as it trains, and needs a loss of its own",
        "leave it out",
    ),
    "arrow_config": ("it mixes adapters that exist already", "leave it out"),
    "use_bdlora": ("its factors are split for one way of serving", "leave it out"),
    "alora_invocation_tokens": (
        "the adapter would be off in front of these tokens, which stock scoring does not pass on",
        "leave it out",
    ),
    "use_asa": ("it drops subspaces by a call after every step", "leave it out"),
    "generator_seed": ("noise of training is drawn from the run's seed", "set [run] seed"),
    "sample_at_inference": ("two readings of one adapter would score differently", "leave it out"),
    "save_projection": ("an exported adapter has all that it needs", "leave it out"),
    "save_indices": ("an exported adapter has all that it needs", "leave it out"),
    "save_precomputed_indices": ("an exported adapter has all that it needs", "leave it out"),
    "save_only_topk_weights": ("it saves less than it trains", "leave it out"),
    "runtime_offload_base_weight": ("it moves base weights about as it runs", "leave it out"),
    "progressbar": ("it is about the console, which fedft writes", "leave it out"),
}
"""Field → why it is not passed on, and what to do."""

_FROM_DATA = ("it starts from data, which the server does not have", "use [lora] init")
_VALUES: Mapping[str, tuple[re.Pattern[str], tuple[str, str]]] = {
    "bias": (
        re.compile("all"),
        (
            "it would train biases outside of the adapted layers, those of the head among them",
            "name the adapted layers alone, such as bias = 'lora_only'",
        ),
    ),
    "init_lora_weights": (
        re.compile("eva|corda|lora_ga|loftq"),
        _FROM_DATA,
    ),
}
"""Field → values (fully matched) that are not passed on, why, and what to do."""

_STARTS: Mapping[str, tuple[str, str]] = {
    "pissa": ("it changes the base weights", 'method = "lora" with init = "pissa"'),
    "olora": ("it changes the base weights", 'method = "lora" with init = "olora"'),
    "mica": (
        "it freezes a decomposition of the weights that clients need not agree on",
        "leave it out",
    ),
}
"""Beginnings of ``init_lora_weights`` that are not passed on."""


def check_option(method: str, name: str, value: Any) -> None:
    """Refuse a field of peft's configuration that is not for `[lora] options`.

    Args:
        method: as in `[lora]`.
        name: of the field; that the method has it is checked elsewhere.
        value: as the user gave it.

    Raises:
        ConfigError: naming the key to use instead, or why there is none.
    """
    if name in tuner_of(method).unfilled:
        return
    own = {f"{method}_alpha": "[lora] alpha", f"{method}_dropout": "[lora] dropout", **_OWN}
    if name in own:
        raise ConfigError(
            f"[lora] options: {name} is {own[name]} here", fix=f"Set {own[name]} instead."
        )
    refusal = _FIELDS.get(name)
    if name in _WRITTEN:
        refusal = ("it is about the exported file, which is written with it", "leave it out")
    pattern, why = _VALUES.get(name, (None, None))
    if pattern is not None and isinstance(value, str) and pattern.fullmatch(value):
        refusal = why
    if reason := tuner_of(method).refused.get(name):
        refusal = (reason, "leave it out")
    if name == "init_lora_weights" and isinstance(value, str):
        refusal = next((w for s, w in _STARTS.items() if value.startswith(s)), refusal)
    if refusal is not None:
        reason, fix = refusal
        raise ConfigError(
            f"[lora] options: {name} = {value!r} is not passed on: {reason}",
            fix=f"{fix[0].upper()}{fix[1:]}.",
        )


# ------------------------------------------------------------------------------ adapted layers


def norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers with one weight a channel: LayerNorm, RMSNorm and what models call so."""
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and getattr(weight, "ndim", 0) == 1:
            yield path, module


def chosen(
    key: str, names: tuple[str, ...] | str, candidates: Collection[str], method: str
) -> set[str]:
    """The layers that a key of `[lora]` names.

    Args:
        key: ``target-modules`` or ``exclude-modules``.
        names: a list of names, each the end of a path from a dot on; ``all-linear``; or a regular
            expression that all of a path must match.
        candidates: paths of the layers that can be named.
        method: as in `[lora]`.

    Raises:
        ConfigError: a name, or the expression, matches none of them.
    """
    kind = tuner_of(method).layers
    if names == "all-linear" and kind == "linear":
        return {*candidates}
    if isinstance(names, str):
        found = {path for path in candidates if re.fullmatch(names, path)}
        if not found:
            present = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in candidates})[:8])
            raise ConfigError(
                f"[lora] {key} = {names!r}: no {kind} layer's whole path matches this expression",
                fix=f"Names are a list, such as [{names!r}]; layers are called {present}.",
            )
        return found
    matched: set[str] = set()
    for name in names:
        found = {path for path in candidates if path == name or path.endswith("." + name)}
        if not found:
            present = sorted({path.rsplit(".", 1)[-1] for path in candidates})
            near = spelling.near(name, present, 3)
            raise ConfigError(
                f"[lora] {key}: no {kind} layer of this model is called {name!r}",
                fix=f"Nearest names: {', '.join(near)}."
                if near
                else f"It has {', '.join(present[:8])}.",
            )
        matched |= found
    return matched
