"""How much memory local training takes, from shapes alone.

An estimate for planning: weights, gradients and optimiser state are exact; activations count what
autograd keeps of a block whose weights are frozen.
"""

from dataclasses import dataclass

from fedft.core.spec import Precision


@dataclass(frozen=True)
class Geometry:
    """The sizes of a transformer that decide about its activations.

    Attributes:
        blocks: number of transformer blocks.
        hidden: width of the residual stream.
        intermediate: width inside the feed-forward part.
        heads: attention heads.
        vocabulary: outputs per token of a language model; 0 where there is no such head.
    """

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int = 0


def peak(
    geometry: Geometry,
    *,
    base_parameters: int,
    trainable: int,
    batch: int,
    tokens: int,
    precision: Precision,
) -> dict[str, float]:
    """Peak bytes of one site in training: ``base``, ``adapter``, ``activations`` and ``total``.

    ``adapter`` is float32 weights, gradients and AdamW's two moments, 16 bytes a parameter, and
    the 4 bytes of the start that the round needs. ``activations`` are, for each block, what
    autograd keeps per token (inputs of LayerNorms and of the activation, queries, keys, values,
    the attention's output, and the adapters' inputs: about 8 hidden + 2 intermediate numbers), the
    attention weights where attention is eager, and the logits three times over.

    Args:
        geometry: of the model.
        base_parameters: frozen parameters.
        trainable: parameters that learn at this site.
        batch: rows a step.
        tokens: longest row.
        precision: of the base.
    """
    width = 2 if precision == "bf16" else 4
    per_token = 8 * geometry.hidden + 2 * geometry.intermediate
    attention = 2 * geometry.heads * tokens if precision == "bf16" else 0
    stream = geometry.blocks * (per_token + attention) * width
    logits = 3 * geometry.vocabulary * 4
    parts = {
        "base": float(base_parameters * width),
        "adapter": 20.0 * trainable,
        "activations": float(batch * tokens * (stream + logits)),
    }
    return {**parts, "total": sum(parts.values())}
