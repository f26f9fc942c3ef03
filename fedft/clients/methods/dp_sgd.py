"""DP-SGD: local training that protects each example of a site.

    Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv:1607.00133.

A step's batch is a Poisson sample of the site's examples, of mean size b. With g_i the gradient of
example i's own loss over all trained tensors as one vector, C the bound and z the noise multiplier,

    g = (sum_i g_i min(1, C / ||g_i||) + N(0, (z C)^2 I)) / b

takes the place of the gradient; the optimiser goes on from there. An empty batch is a step of noise.

Per-example gradients are Opacus's, from hooks on the layers that train: PEFT's factors and the head
are plain linear layers to it. Its optimiser is not used: it takes noise from torch's generator,
which keeps 32 bits of a seed, and sums in single precision. Clipping, sum and noise are those of
:mod:`fedft.core.privacy.mechanism`, the random numbers those of :mod:`fedft.core.privacy.entropy`. Penalties
(FedProx, HetLoRA) depend on weights alone and are added after the noise.

What a site reports beside its tensors would not be covered by the noise: it reports the number of
its steps, which is no secret, and neither loss nor gradient norms.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedft.core.errors import MismatchError
from fedft.core.extras import extra
from fedft.core.privacy import entropy
from fedft.core.privacy.mechanism import GaussianSum
from fedft.core.types import Batch, LocalTraining


def private_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training: LocalTraining,
    batches: Sequence[Batch],
    loss: Callable[[Batch], Tensor],
    penalties: Callable[[], Iterable[Tensor]],
) -> dict[str, float]:
    """Train in place, one DP-SGD step a batch.

    Args:
        model: with the tensors that train in it; only they require a gradient.
        optimizer: of these tensors.
        training: the noise, the bound and the mean batch size.
        batches: Poisson samples; some may be empty.
        loss: the sum of the examples' own losses.
        penalties: terms of the loss that depend on the weights alone.

    Returns:
        ``steps``.

    Raises:
        EnvironmentFailure: Opacus is not installed.
        ConfigError: no noise can be made of these figures.
        MismatchError: a tensor trains in a layer whose gradients cannot be told by example.
    """
    trained: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]
    size = sum(p.numel() for p in trained)
    mechanism = GaussianSum(training.dp_clip, training.dp_noise, size)
    with _per_example(model):
        for batch in batches:
            own = _own_gradients(trained, batch, loss)
            released = mechanism.released(mechanism.clipped(own), entropy.gaussian)
            for parameter, gradient in zip(trained, released, strict=True):
                mean = gradient / training.batch_size
                parameter.grad = mean.to(parameter.dtype).to(parameter.device)
            for parameter, gradient in _gradients(penalties(), trained):
                assert parameter.grad is not None
                parameter.grad += gradient
            optimizer.step()
    return {"steps": float(len(batches))}


def _own_gradients(
    trained: Sequence[nn.Parameter], batch: Batch, loss: Callable[[Batch], Tensor]
) -> list[Tensor]:
    """Each example's own gradient. [n, *shape], for each tensor that trains"""
    if not len(batch):
        return [p.detach().new_zeros(0, *p.shape) for p in trained]
    for parameter in trained:
        parameter.grad = cast(Any, parameter).grad_sample = None
    loss(batch).backward()
    own = [cast(Any, p).grad_sample for p in trained]
    for gradients in own:
        if not isinstance(gradients, Tensor) or len(gradients) != len(batch):
            raise MismatchError(
                "a tensor that trains is in a layer whose gradients cannot be told by example",
                fix="Choose other target modules; DP-SGD trains linear layers.",
            )
    for parameter in trained:
        cast(Any, parameter).grad_sample = None
    return own


def _gradients(
    terms: Iterable[Tensor], parameters: Sequence[nn.Parameter]
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for term in terms:
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(term, parameters, allow_unused=True), strict=True
        ):
            if gradient is not None:
                yield parameter, gradient


@contextmanager
def _per_example(model: nn.Module) -> Iterator[None]:
    """Opacus's hooks on the layers that train; they record only in layers in training mode."""
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
