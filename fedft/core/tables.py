"""Large frozen tables that stay in their file: a row is in memory only while it is looked at.

A language model's word embeddings, and the output layer that often is the same table, are the part
of it that a budget of blocks cannot shrink. A step reads a few hundred rows of the one, and all of
the other, but only a slice at a time. Both are pages of the safetensors file, and pages that have
been read are handed back to the system, which keeps them in its cache as long as it has room: the
next step finds them there, or reads the file again.
"""

# pyright: standard
# transformers is typed in part.
import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedft.core.overrides import overridden

WINDOW = 8 << 20
"""Bytes of a table that are in memory at a time."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64}


class Table:
    """A [n, d] tensor of a safetensors file on the CPU.

    Args:
        path: of the file.
        name: of the tensor in it.

    Attributes:
        weight: all rows, as pages of the file. A view: reading a row brings its page into memory.
    """

    def __init__(self, path: Path, name: str) -> None:
        header, start = _header(path)
        entry = header[name]
        n, d = entry["shape"]
        with path.open("rb") as file:  # private pages that are never written, for torch's sake
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._offset = start + int(entry["data_offsets"][0])
        flat = torch.frombuffer(
            self._pages, dtype=_DTYPES[entry["dtype"]], count=n * d, offset=self._offset
        )
        self.weight = flat.view(n, d)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of these ids, [..., d]; none of the table's pages is in memory afterwards."""
        wanted, where = ids.unique(return_inverse=True)  # ascending
        found = self.weight.new_empty(len(wanted), self.weight.shape[1])
        step = max(1, WINDOW // _row_bytes(self.weight))
        starts = torch.arange(0, len(self.weight) + step, step)
        bounds = torch.searchsorted(wanted, starts).tolist()
        for i, (first, last) in enumerate(pairwise(bounds)):
            if first < last:
                found[first:last] = self.weight[wanted[first:last]]
                self.release(i * step, (i + 1) * step)
        return found[where]

    def release(self, start: int, stop: int) -> None:
        """Hand the pages of the rows from ``start`` to before ``stop`` back; they can be read again."""
        size = _row_bytes(self.weight)
        first = (self._offset + start * size) // mmap.PAGESIZE * mmap.PAGESIZE
        last = min(self._offset + stop * size, len(self._pages))
        advice: int | None = getattr(mmap, "MADV_DONTNEED", None)  # Windows has none
        if advice is not None:
            cast(Any, self._pages).madvise(advice, first, last - first)


@dataclass(frozen=True, eq=False)
class Output:
    """A frozen output layer whose answers are the model's logits, with nothing in between.

    Attributes:
        layer: [V, d].
        table: its weight where that stays in its file; None where it is in memory.
    """

    layer: nn.Linear
    table: Table | None = None


def output_of(model: nn.Module) -> nn.Linear | None:
    """The layer that gives a language model's logits; None where they are made otherwise.

    Models that scale or cap what their last layer answers are told by it: it is made to answer a
    ramp from -1000 to 1000, in a pass of one token, and the ramp has to come out. So has one that is
    as wide as what enters the layer: BART adds a bias of its own, zero or not, to each word.
    """
    asked: Any = model
    layer = asked.get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None
    same = all(_passes(asked, layer, width) for width in (layer.out_features, layer.in_features))
    return layer if same else None


def _passes(model: Any, layer: nn.Linear, width: int) -> bool:
    """Whether what a layer is made to answer for one token, [1, 1, width], are the model's logits."""
    like = layer.weight
    ramp = torch.linspace(-1000, 1000, width, device=like.device).to(like.dtype)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=like.device)
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    # In place of its forward: a product would bring all its pages into memory.
    with overridden(layer, lambda _: ramp.clone()[None, None]), torch.no_grad():
        try:
            logits = model(**inputs).logits
        except RuntimeError:  # something as wide as the words is done to it
            return False
    return logits.numel() == ramp.numel() and torch.equal(logits.flatten().to(ramp.dtype), ramp)


def shared_by(model: nn.Module, output: nn.Linear | None) -> dict[str, list[nn.Module]]:
    """The tables of a model that can stay in their file: path of the tensor → the layers it is in.

    Args:
        model: on the meta device, or in memory.
        output: as :func:`output_of` has it. Where another layer makes the logits of the table of
            words, all of that is in memory anyway.
    """
    asked: Any = model
    words = asked.get_input_embeddings()
    users: list[nn.Linear | nn.Embedding] = [] if output is None else [output]
    if type(words) is nn.Embedding and words.max_norm is None:
        last = asked.get_output_embeddings()
        if last is None or output is not None or last.weight is not words.weight:
            users.append(words)
    paths = {id(parameter): path for path, parameter in model.named_parameters()}
    found: dict[str, list[nn.Module]] = {}
    for layer in users:
        found.setdefault(paths[id(layer.weight)], []).append(layer)
    return found


def leave_in_file(model: nn.Module, folder: Path | None, output: nn.Linear | None) -> Output | None:
    """Make layers of a model read tables from its file; what there is to know of its output layer.

    Args:
        model: frozen. A table that the file has in another dtype is left as it is.
        folder: it came from; None leaves every table as it is.
        output: as :func:`output_of` has it.
    """
    by_layer: dict[nn.Module, Table] = {}
    for path, layers in shared_by(model, output).items():
        wanted = model.get_parameter(path).dtype
        table = None if folder is None else find(folder, path, wanted)
        if table is None:
            continue
        weight = nn.Parameter(table.weight, requires_grad=False)
        for layer in layers:
            layer.weight = weight
            by_layer[layer] = table
            if isinstance(layer, nn.Embedding):
                vars(layer)["forward"] = table.rows
    return None if output is None else Output(output, by_layer.get(output))


def parameters_in_file(
    model: nn.Module, folder: Path, output: nn.Linear | None
) -> Mapping[torch.dtype, int]:
    """Parameters that :func:`leave_in_file` leaves there, by the dtype that the run would need."""
    found: dict[torch.dtype, int] = {}
    for path in shared_by(model, output):
        for dtype in _DTYPES.values():
            if find(folder, path, dtype) is not None:
                found[dtype] = found.get(dtype, 0) + model.get_parameter(path).numel()
    return found


def find(folder: Path, parameter: str, dtype: torch.dtype) -> Table | None:
    """A parameter of the model in ``folder``; None where no file has it in this dtype.

    Args:
        folder: with safetensors files.
        parameter: its path in the model, which may have a prefix that files leave out.
        dtype: that is wanted.
    """
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in _header(path)[0].items():
            same = parameter == name or parameter.endswith(f".{name}")
            if same and len(entry["shape"]) == 2 and _DTYPES.get(entry["dtype"]) == dtype:
                return Table(path, name)
    return None


def _header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries of a safetensors file by name, and where the tensors begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def _row_bytes(weight: Tensor) -> int:
    return weight.shape[1] * weight.element_size()
