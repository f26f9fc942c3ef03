"""The vision transformer inside an ONNX file, as a folder that transformers loads.

The file is a ViT-S/14 of DINOv2's geometry under a decoder for saliency maps, which is left out.
ONNX keeps the names of most weights; those of linear layers are found through the nodes that use
them, and are stored transposed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from torch import Tensor, nn

from fedft.core.errors import MismatchError

NATIVE_PIXELS = 518
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the package has them

# The fields of onnx.proto that are read: message → (field, number, type, repeated).
_SCHEMA = {
    "Model": [("graph", 7, "Graph", False)],
    "Graph": [
        ("node", 1, "Node", True),
        ("initializer", 5, "Tensor", True),
        ("output", 12, "Value", True),
    ],
    "Node": [("input", 1, "string", True), ("name", 3, "string", False)],
    "Tensor": [
        ("dims", 1, "int64", True),
        ("data_type", 2, "int32", False),
        ("name", 8, "string", False),
        ("raw_data", 9, "bytes", False),
    ],
    "Value": [("name", 1, "string", False)],
}
_FLOAT = 1  # TensorProto.DataType

_RENAMED = {
    "backbone.": "dinov2.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def convert(onnx: Path, folder: Path, *, pixels: int, classes: Sequence[str]) -> None:
    """Write the transformer for square images of ``pixels``, with a head of zeros.

    Args:
        onnx: the file.
        folder: for ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``.
        pixels: height and width, a multiple of 14. The position embeddings are interpolated as
            the model itself would.
        classes: names of the classes.
    """
    from transformers import BitImageProcessorPil

    model = at_size(read(onnx), pixels, classes)
    model.save_pretrained(folder)
    # The images are prepared at the model's size, so that no batch resizes them again.
    processor: Any = BitImageProcessorPil(
        do_resize=False,
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    processor.save_pretrained(folder)


def read(onnx: Path) -> Any:
    """The model at its native size of 518 pixels, with a head of two classes that is zero.

    Raises:
        MismatchError: the file does not hold the transformer that is expected.
    """
    model = _empty(NATIVE_PIXELS, ("0", "1"))
    weights = dict(_weights(_parsed(onnx).graph))
    wanted = model.state_dict()
    weights["dinov2.embeddings.mask_token"] = torch.zeros(1, 384)  # of pretraining only
    weights |= {n: torch.zeros_like(t) for n, t in wanted.items() if n.startswith("classifier.")}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
        wrong = sorted({*shapes} ^ {*wanted}) or [n for n in shapes if shapes[n] != wanted[n].shape]
        raise MismatchError(f"{onnx.name} is not the ViT-S/14 that is expected: {wrong[:5]}")
    model.load_state_dict(weights)
    return model


def at_size(native: Any, pixels: int, classes: Sequence[str]) -> Any:
    """The same model for images of another size and with another head of zeros."""
    model = _empty(pixels, classes)
    weights = {n: t for n, t in native.state_dict().items() if not n.startswith("classifier.")}
    tokens = torch.zeros(1, (pixels // 14) ** 2 + 1, 384)
    positions = "dinov2.embeddings.position_embeddings"
    with torch.no_grad():
        weights[positions] = native.dinov2.embeddings.interpolate_pos_encoding(
            tokens, pixels, pixels
        )
    model.load_state_dict(weights, strict=False)
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    return model


def disagreement(onnx: Path) -> float:
    """Largest difference of the features to those that onnxruntime computes, on random images.

    Relative to the largest feature. Needs the package onnxruntime.
    """
    import onnxruntime

    parsed = _parsed(onnx)
    features = "/backbone/layernorm/Add_1_output_0"
    parsed.graph.output.add().name = features
    session = onnxruntime.InferenceSession(
        parsed.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    images = np.random.default_rng(0).standard_normal((2, 3, 224, 224), np.float32)
    (theirs,) = session.run([features], {"input_image": images})
    with torch.inference_mode():
        ours = read(onnx).dinov2(torch.from_numpy(images)).last_hidden_state.numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _empty(pixels: int, classes: Sequence[str]) -> Any:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        image_size=pixels,
        patch_size=14,
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
    )
    return Dinov2ForImageClassification(config).eval()


def _weights(graph: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the transformer under its name in transformers."""
    users = {node.input[1]: node.name for node in graph.node if node.name.endswith("/MatMul")}
    positions: list[Tensor] = []
    for tensor in graph.initializer:
        name = tensor.name
        if name.startswith("backbone."):
            yield _renamed(name), _tensor(tensor)
        elif users.get(name, "").startswith("/backbone/"):
            path = users[name].removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            yield _renamed(f"{path}.weight"), _tensor(tensor).T.contiguous()
        elif name.startswith("onnx::"):  # of the class token, and of the patches
            positions.append(_tensor(tensor))
    positions.sort(key=lambda tensor: tensor.shape[1])
    yield "dinov2.embeddings.position_embeddings", torch.cat(positions, dim=1)


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def _tensor(tensor: Any) -> Tensor:
    if tensor.data_type != _FLOAT:
        raise MismatchError(f"{tensor.name} is not a tensor of float32")
    values = np.frombuffer(tensor.raw_data, "<f4").reshape(tuple(tensor.dims))
    return torch.from_numpy(values.copy())


def _parsed(onnx: Path) -> Any:
    """The file as protobuf; fields that are not declared here are kept, unread."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="read.proto", package="read")
    for message, fields in _SCHEMA.items():
        declared = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            entry = declared.field.add(name=name, number=number, label=label)
            if kind in _SCHEMA:
                entry.type, entry.type_name = field.TYPE_MESSAGE, f".read.{kind}"
            else:
                entry.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    model = message_factory.GetMessageClass(pool.FindMessageTypeByName("read.Model"))
    return model.FromString(onnx.read_bytes())
