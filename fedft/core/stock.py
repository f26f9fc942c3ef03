"""What stock transformers and peft make of an exported adapter: nothing of fedft runs in it."""

# pyright: standard
# peft and transformers are typed in part.
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fedft.core.adapters.files import WEIGHTS
from fedft.core.checkpoint import Head, auto_class, refusing
from fedft.core.errors import MismatchError
from fedft.core.metrics import Tally
from fedft.core.spec import ModelSpec, Precision
from fedft.core.tasks import Task, log_likelihoods, task_of
from fedft.core.text.special_tokens import SpecialTokens
from fedft.core.types import PREFIX, Batch

if TYPE_CHECKING:
    from peft import PeftModel


def stock_model(
    export: Path,
    spec: ModelSpec,
    folder: Path,
    classes: int,
    precision: Precision,
    special: SpecialTokens | None,
) -> nn.Module:
    """The base by ``from_pretrained`` with the adapter by ``PeftModel.from_pretrained``.

    Args:
        export: folder of the adapter.
        spec: the base model.
        folder: where it is on this machine.
        classes: number of classes; ignored for a causal language model.
        precision: ``bf16`` loads the base in bfloat16, anything else in float32.
        special: what pads, as a user takes it from the tokenizer that comes with an export.

    Raises:
        MismatchError: stock peft cannot load the adapter.
    """
    from peft import PeftModel

    with refusing(spec, folder):
        base = auto_class(spec.task).from_pretrained(
            folder,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=spec.trust_remote_code,
            **task_of(spec.task).options(classes),
        )
    task_of(spec.task).settle(base, spec.embedding, folder)
    if special is not None:
        special.follow(base)
    try:
        with warnings.catch_warnings():  # what peft remarks to its user is no error
            warnings.simplefilter("ignore")
            model: nn.Module = PeftModel.from_pretrained(base, export).eval()
    except Exception as error:  # peft raises whatever torch and json do
        raise MismatchError(
            f"stock peft cannot load the exported adapter in {export}: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="The run is kept. [engine] verify = false ends it without this check.",
        ) from error
    return model


def unlike(model: nn.Module, export: Path, head: Head) -> list[str]:
    """Names of tensors that a loaded model does not hold as the file has them.

    Args:
        model: of :func:`stock_model`.
        export: folder of the adapter.
        head: of the base. What of it the file lacks is random in the model, and listed too.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    stored = load_file(export / WEIGHTS)
    held: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)  # pyright: ignore

    def same(name: str, tensor: Tensor) -> bool:
        found = held.get(name)
        return found is not None and torch.equal(
            found.float().cpu(), tensor.to(found.dtype).float()
        )

    lost = [name for name in (PREFIX + n for n in head.parameters) if name not in stored]
    return sorted({*(n for n, t in stored.items() if not same(n, t)), *lost})


def tallies(
    model: nn.Module, task: Task, groups: Iterable[Iterable[Batch]], names: Sequence[str] = ()
) -> Iterator[Tally]:
    """The sums over the rows of each group, without gradients; ``names`` of the classes."""
    with torch.inference_mode():
        for batches in groups:
            yield Tally.total(_tally(model, task, batch, names) for batch in batches)


def _tally(model: nn.Module, task: Task, batch: Batch, names: Sequence[str]) -> Tally:
    outputs = task.outputs(model, batch.inputs)
    if not task.refers:
        return task.judged(outputs, batch.labels, names)
    with cast("PeftModel", model).disable_adapter():
        bare = log_likelihoods(task, task.outputs(model, batch.inputs), batch.labels)
    return task.judged(outputs, batch.labels, names, bare)
