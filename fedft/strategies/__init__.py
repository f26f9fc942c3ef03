"""The aggregation rules, one file each, and one row each here."""

from collections.abc import Iterable

from fedft.core.errors import ConfigError
from fedft.core.types import Adapter, Factors
from fedft.strategies.base import Strategy
from fedft.strategies.beside import first_plan
from fedft.strategies.central_dp import CentralDP
from fedft.strategies.coordinate_median import CoordinateMedian
from fedft.strategies.exact_mixed_rank import ExactMixedRank
from fedft.strategies.facts import RunFacts
from fedft.strategies.fed_sb import FedSB
from fedft.strategies.fedasync import FedAsync
from fedft.strategies.fedavg_lora import FedAvgLoRA
from fedft.strategies.fedbuff import FedBuff
from fedft.strategies.feddyn import FedDyn
from fedft.strategies.fedex_lora import FedExLoRA
from fedft.strategies.fedmomentum import FedMomentum
from fedft.strategies.fednova import FedNova
from fedft.strategies.fedprox import FedProx
from fedft.strategies.fedrot_lora import FedRotLoRA
from fedft.strategies.fedsa_lora import FedSALoRA
from fedft.strategies.fedsvd import FedSVD
from fedft.strategies.ffa_lora import FFALoRA
from fedft.strategies.flexlora import FlexLoRA
from fedft.strategies.flora import FLoRA
from fedft.strategies.hetlora import HetLoRA
from fedft.strategies.hydralora import HydraLoRA
from fedft.strategies.krum import Krum
from fedft.strategies.lora_fair import LoRAFAIR
from fedft.strategies.multi_krum import MultiKrum
from fedft.strategies.named import REGISTRY, AnyStrategy, enter
from fedft.strategies.norm_clip import NormClip
from fedft.strategies.raflora import RaFLoRA
from fedft.strategies.rolora import RoLoRA
from fedft.strategies.scaffold import Scaffold
from fedft.strategies.server_optimizers import FedAdam, FedAvgM, FedYogi
from fedft.strategies.trimmed_mean import TrimmedMean

RULES = enter(
    FedAvgLoRA,
    FFALoRA,
    LoRAFAIR,
    FLoRA,
    FlexLoRA,
    HetLoRA,
    RaFLoRA,
    ExactMixedRank,
    FedExLoRA,
    RoLoRA,
    FedSALoRA,
    FedRotLoRA,
    FedSVD,
    FedMomentum,
    FedSB,
    FedProx,
    Scaffold,
    FedDyn,
    FedNova,
    FedAvgM,
    FedAdam,
    FedYogi,
    FedAsync,
    FedBuff,
    NormClip,
    CoordinateMedian,
    TrimmedMean,
    HydraLoRA,
    Krum,
    MultiKrum,
    CentralDP,
)
"""Our own rules, in the order in which they are listed to users."""


def rule_names(*, mixed_ranks: bool = False) -> list[str]:
    """The name of every rule, as `[strategy] name` takes it; or of those that take mixed ranks."""
    chosen = [rule for rule in RULES if rule().mixed_ranks or not mixed_ranks]
    return [str(rule.model_fields["name"].default) for rule in chosen]


def check_method(strategy: Strategy, method: str) -> None:
    """Refuse an `[lora] method` whose adapters the rule cannot aggregate.

    Raises:
        ConfigError: naming the rules that can.
    """
    if strategy.supports(method):
        return
    able = [str(rule.model_fields["name"].default) for rule in RULES if rule().supports(method)]
    raise ConfigError(
        f"{strategy.name} cannot aggregate adapters of method = {method!r}: "
        "its equation is about other tensors",
        fix=f"choose a rule that can: {', '.join(able)}",
    )


def check_init(strategy: Strategy, init: str) -> None:
    """Refuse a start of A and B that depends on the base weights, where sites make part of it.

    Raises:
        ConfigError: the rule does not send all of the adapter to its sites.
    """
    if init != "default" and not first_plan(strategy).receive >= {"A", "B"}:
        raise ConfigError(
            f"init = {init!r} needs A and B sent to the clients, and {strategy.name} does not send both",
            fix="set [lora] init = 'default', or choose a rule such as fedavg-lora or lora-fair",
        )


def check_start(strategy: Strategy) -> None:
    """Refuse to go on from an adapter where sites make part of the first one, or the rule makes another.

    Raises:
        ConfigError: saying which.
    """
    fix = "leave [lora] start out, or choose a rule such as fedavg-lora, fedex-lora or flexlora"
    if not first_plan(strategy).receive >= {"A", "B", "head"}:
        raise ConfigError(
            f"start needs A, B and the head sent to the clients, and {strategy.name} does not send all",
            fix=fix,
        )
    import torch

    given = Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 1.0)
    state = strategy.init(Adapter({"layer": given}))
    products = [f["layer"].product() for f in (state.adapter.factors, state.delta) if "layer" in f]
    if not torch.allclose(sum(products, torch.zeros(2, 2)), given.product()):
        raise ConfigError(
            f"{strategy.name} makes its first adapter itself, and would not go on from start",
            fix=fix,
        )


def check_ranks(strategy: Strategy, ranks: Iterable[int | None]) -> None:
    """Refuse ranks that the rule cannot take.

    Args:
        strategy: the rule.
        ranks: of the sites; None is the run's own rank.

    Raises:
        ConfigError: the ranks differ and the rule averages factors entry by entry.
    """
    distinct = set(ranks)
    if len(distinct) < 2 or strategy.mixed_ranks:
        return
    able = rule_names(mixed_ranks=True)
    shown = ", ".join("the run's" if r is None else str(r) for r in sorted(distinct, key=str))
    raise ConfigError(
        f"{strategy.name} cannot take clients of different ranks ({shown})",
        fix=f"give all clients one rank, or choose a rule that can: {', '.join(able)}",
    )


__all__ = [
    "REGISTRY",
    "RULES",
    "AnyStrategy",
    "CentralDP",
    "CoordinateMedian",
    "ExactMixedRank",
    "FFALoRA",
    "FLoRA",
    "FedAdam",
    "FedAsync",
    "FedAvgLoRA",
    "FedAvgM",
    "FedBuff",
    "FedDyn",
    "FedExLoRA",
    "FedMomentum",
    "FedNova",
    "FedProx",
    "FedRotLoRA",
    "FedSALoRA",
    "FedSB",
    "FedSVD",
    "FedYogi",
    "FlexLoRA",
    "HetLoRA",
    "HydraLoRA",
    "Krum",
    "LoRAFAIR",
    "MultiKrum",
    "NormClip",
    "RaFLoRA",
    "RoLoRA",
    "RunFacts",
    "Scaffold",
    "Strategy",
    "TrimmedMean",
    "check_init",
    "check_method",
    "check_ranks",
    "check_start",
    "rule_names",
]
