"""Federated fine-tuning of pretrained transformers.

    import fedft
    run = fedft.simulate("examples/quickstart/config.toml", strategy="ffa-lora", seed=1)
    run.adapter().save_pretrained("adapter")

Names are imported when first used, so that importing a part never loads the whole.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedft.api import Comparison, ExportedAdapter, Run, compare, model_folder, resume, simulate
    from fedft.core.errors import FedftError
    from fedft.core.types import Adapter, Factors
    from fedft.mixture import load_mixture

    __version__: str

_HOME = {
    "Adapter": "fedft.core.types",
    "Comparison": "fedft.api",
    "ExportedAdapter": "fedft.api",
    "Factors": "fedft.core.types",
    "FedftError": "fedft.core.errors",
    "Run": "fedft.api",
    "compare": "fedft.api",
    "load_mixture": "fedft.mixture",
    "model_folder": "fedft.api",
    "resume": "fedft.api",
    "simulate": "fedft.api",
}

__all__ = [
    "Adapter",
    "Comparison",
    "ExportedAdapter",
    "Factors",
    "FedftError",
    "Run",
    "compare",
    "load_mixture",
    "model_folder",
    "resume",
    "simulate",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return metadata.version("fedft")
    if name not in _HOME:
        raise AttributeError(f"module 'fedft' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
