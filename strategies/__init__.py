"""The aggregation rules, one file each, and the union that the `[strategy]` table is read as."""

from typing import Annotated

from pydantic import Field

from strategies.base import Strategy
from strategies.fedavg_lora import FedAvgLoRA
from strategies.ffa_lora import FFALoRA

AnyStrategy = Annotated[FedAvgLoRA | FFALoRA, Field(discriminator="name")]
"""Any rule, chosen by its ``name``."""

__all__ = ["AnyStrategy", "FFALoRA", "FedAvgLoRA", "Strategy"]
