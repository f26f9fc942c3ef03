"""Gradients example by example, for methods that ask for them.

They are Opacus's, from hooks on the layers that train: PEFT's factors and the head are plain linear
layers to it. Its optimiser is not used: it takes noise from torch's generator, which keeps 32 bits
of a seed, and sums in single precision.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from fedft.core.errors import MismatchError
from fedft.core.extras import extra


def own_gradients(
    trained: Sequence[nn.Parameter], examples: int, losses: Callable[[], Tensor], each: int = 1
) -> list[Tensor]:
    """Each example's own gradient. [n, *shape], for each tensor that trains

    Args:
        trained: the tensors.
        examples: n.
        losses: makes the sum of the examples' own losses, inside of :func:`recording`.
        each: rows of the model that an example has, one below another; their gradients add up.

    Raises:
        MismatchError: a tensor trains in a layer whose gradients cannot be told by example.
    """
    if not examples:
        return [p.detach().new_zeros(0, *p.shape) for p in trained]
    for parameter in trained:
        parameter.grad = cast(Any, parameter).grad_sample = None
    losses().backward()
    own = [cast(Any, p).grad_sample for p in trained]
    for gradients in own:
        if not isinstance(gradients, Tensor) or len(gradients) != examples * each:
            raise MismatchError(
                "a tensor that trains is in a layer whose gradients cannot be told by example",
                fix="Choose other target modules; DP-SGD trains linear layers.",
            )
    for parameter in trained:
        cast(Any, parameter).grad_sample = None
    return own if each == 1 else [g.unflatten(0, (examples, each)).sum(1) for g in own]


@contextmanager
def recording(model: nn.Module) -> Iterator[None]:
    """Opacus's hooks on the layers that train; they record only in layers in training mode.

    Raises:
        EnvironmentFailure: Opacus is not installed.
    """
    learning = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(False))]
    modes = [m.training for m in learning]
    with warnings.catch_warnings():
        # The first adapted layer's input comes from frozen layers, which is meant.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        hooks = _opacus().GradSampleModule(model, loss_reduction="sum", strict=False)
        try:
            for module in learning:
                module.training = True
            yield
        finally:
            hooks.to_standard_module()
            for module, mode in zip(learning, modes, strict=True):
                module.training = mode


def _opacus() -> Any:
    with extra("privacy", "this run trains with differential privacy"):
        import opacus
    return opacus
