"""The pretrained model: where it comes from, which of its layers are adapted, how it is loaded.

A model is known in two forms. Its :class:`Schema` (shapes of the adapted layers and of the head)
is read from the configuration alone, with no weight in memory: that is all a server needs. Its
:class:`Base` is the frozen network itself, resident in a worker or at a client.
"""

from fedft.core.models.base import Base
from fedft.core.models.layers import (
    Schema,
    block_list,
    initial_adapter,
    linears,
    schema,
    schema_of,
    target_names,
    targets,
    transposes,
    weight_shape,
)
from fedft.core.models.load import check_quantized, frozen_values, load_base, load_first, special_of
from fedft.core.models.sizes import KNOWN, check_known, geometry, load_of, positions
from fedft.core.models.source import (
    file_sha256,
    fingerprint,
    imports,
    input_encoder,
    load_tokenizer,
    resolve,
)

__all__ = [
    "KNOWN",
    "Base",
    "Schema",
    "block_list",
    "check_known",
    "check_quantized",
    "file_sha256",
    "fingerprint",
    "frozen_values",
    "geometry",
    "imports",
    "initial_adapter",
    "input_encoder",
    "linears",
    "load_base",
    "load_first",
    "load_of",
    "load_tokenizer",
    "positions",
    "resolve",
    "schema",
    "schema_of",
    "special_of",
    "target_names",
    "targets",
    "transposes",
    "weight_shape",
]
