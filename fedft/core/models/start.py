"""Where the training of a peft method starts, and what its files need beside what was trained.

Both are drawn by peft on the loaded base: some methods start from the base's weights, and some
make frozen tensors of their own.
"""

from collections.abc import Mapping
from functools import lru_cache

from torch import Tensor, nn

from fedft.core.adapters.peft import frozen, injected, trained
from fedft.core.adapters.tuners import TUNERS
from fedft.core.errors import ConfigError
from fedft.core.models.load import load_base
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import Adapter, Delta, Factors, clone


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
    _check_start(lora, initial, tensors)
    adapter = initial.replaced(tensors)
    if lora.init == "default":
        return adapter, {}
    return adapter, {
        module: Factors(-f.scale * f.A, f.B, 1.0) for module, f in adapter.factors.items()
    }


def _check_start(lora: LoraSpec, initial: Adapter, tensors: Mapping[str, Tensor]) -> None:
    promised = initial.tensors()
    if wild := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ConfigError(
            f"[lora] method = {lora.method!r}: peft starts {wild[0]} at numbers that are not finite",
            fix="Leave options such as init_weights out.",
        )
    for name, tensor in tensors.items():
        if name not in promised or promised[name].shape != tensor.shape:
            raise ConfigError(
                f"[lora] method = {lora.method!r}: the shape of {name} depends on the weights, so "
                "that a server cannot know it before they are loaded",
                fix=f"Choose another method, such as {', '.join(TUNERS)}.",
            )


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
    base = load_base(spec.model_copy(update={"load_in": None}), lora, classes=2)
    return injected(base.model, lora, base.adapted, seed), list(base.adapted)
