"""A client as users of Flower write them, for Flower's own simulation engine.

As in FlowerTune's examples, the dataset and its partition are made once in a process, and the
rest for every message: the tokenizer, the site's tokenised rows, the base model, the PEFT model
around it, the trainer. Options make it a tuned peer: it may keep all that (``cached``), and have
the base in bfloat16 with eager attention, which is how PEFT is fast on a CPU.

The trainer is :class:`clients.train.PeftEngine`, the plain loop that everything is compared with;
the example's own is a good deal heavier.
"""

import os
import time
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from clients.train import PeftEngine
from fedft.core import tokens
from fedft.core.batches import batches
from fedft.core.data import RawData, load
from fedft.core.examples import Examples
from fedft.core.models import initial_adapter, load_base, load_tokenizer, resolve, schema
from fedft.core.partition import Manifest, build
from fedft.core.quiet import quiet
from fedft.core.seeds import torch_generator
from fedft.core.spec import TaskSpec, TrainingSpec
from fedft.core.types import TrainPlan


@dataclass(frozen=True, eq=False)
class Trainer:
    """What FlowerTune's client makes for a message."""

    rows: Examples
    engine: PeftEngine


def make_trainer(task_json: str, index: int) -> Trainer:
    """Load everything and tokenise the site's rows."""
    task = TaskSpec.model_validate_json(task_json)
    engine = _engine(task)
    return Trainer(_rows(task_json, index), engine)


def _engine(task: TaskSpec) -> PeftEngine:
    classes = len(_dataset(_data_of(task))[0].classes)
    return PeftEngine(
        load_base(task.model, task.lora, classes, precision=task.precision), task.lora
    )


def _rows(task_json: str, index: int) -> Examples:
    task = TaskSpec.model_validate_json(task_json)
    raw, manifest = _dataset(_data_of(task))
    own = raw.train.take(manifest.rows_of(index))
    assert own.labels is not None
    tokenizer = load_tokenizer(resolve(task.model))
    return tokens.classified(own.inputs, own.labels, tokenizer, task.data.max_length)


@lru_cache(maxsize=1)
def _kept_engine(task_json: str) -> PeftEngine:
    return _engine(TaskSpec.model_validate_json(task_json))


_kept_rows = lru_cache(maxsize=None)(_rows)


def keep_trainer(task_json: str, index: int) -> Trainer:
    """The same, kept in this process."""
    return Trainer(_kept_rows(task_json, index), _kept_engine(task_json))


def _data_of(task: TaskSpec) -> str:
    """The task without what differs between engines."""
    return task.model_copy(update={"precision": "fp32"}).model_dump_json()


@lru_cache(maxsize=1)
def _dataset(task_json: str) -> tuple[RawData, Manifest]:
    task = TaskSpec.model_validate_json(task_json)
    raw = load(task.data, task.model.task, seed=task.seed)
    manifest = build(
        task.data.partition,
        examples=len(raw.train),
        clients=task.clients,
        seed=task.seed,
        labels=raw.train.labels,
    )
    return raw, manifest


# ---------------------------------------------------------------------------------- the apps

client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """One site's epoch."""
    quiet()
    torch.set_num_threads(1)
    about = message.content.config_records["config"]
    make = keep_trainer if about["cached"] else make_trainer
    index = int(context.node_config["partition-id"])
    trainer = make(str(about["task"]), index)
    task = TaskSpec.model_validate_json(str(about["task"]))
    start = initial_adapter(trainer.engine.base.shapes, task.lora, task.lora.rank, task.seed)
    sent = message.content.array_records["arrays"].to_torch_state_dict()
    training = TrainingSpec(batch_size=int(str(about["batch-size"])), epochs=1).local()
    generator = torch_generator(task.seed, "peer", index, int(str(about["server-round"])))
    every = torch.arange(len(trainer.rows)).numpy()
    own = list(batches(trainer.rows, every, training.batch_size, generator=generator))
    plan = TrainPlan(start=start.replaced(sent), training=training, site=str(index))
    (result,) = trainer.engine.train([plan], [own])
    reply = {
        "arrays": ArrayRecord(result.adapter.tensors()),
        "metrics": MetricRecord(
            {"num-examples": len(trainer.rows), "loss": result.metrics["loss"]}
        ),
    }
    return Message(RecordDict(reply), reply_to=message)


class Paced(FedAvg):
    """FedAvg of Flower; a batch size for each round, and when each round began.

    Attributes:
        sizes: batch size of each round.
        begun: monotonic seconds at which each round began.
    """

    def __init__(self, sizes: list[int], **options: Any) -> None:
        super().__init__(**options)
        self.sizes = sizes
        self.begun: list[float] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Any:
        """Stamp the time, and say the round's batch size."""
        self.begun.append(time.monotonic())
        config["batch-size"] = self.sizes[server_round - 1]
        return super().configure_train(server_round, arrays, config, grid)


def run(task: TaskSpec, sites: int, sizes: list[int], *, cached: bool, workers: int) -> list[float]:
    """Seconds of each round, under Flower's simulation engine with FedAvg.

    Args:
        task: data, model and precision; one Flower node for each of its clients.
        sites: clients a round.
        sizes: batch size of each round; as many rounds.
        cached: whether clients keep what they load.
        workers: actors, of one CPU each.
    """
    from flwr.simulation import run_simulation

    server = ServerApp()
    seconds: list[float] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < task.clients:
            time.sleep(0.1)
        classes = len(_dataset(_data_of(task))[0].classes)
        shapes = schema(task.model, task.lora, classes)
        adapter = initial_adapter(shapes, task.lora, task.lora.rank, task.seed)
        strategy = Paced(
            sizes,
            fraction_train=sites / task.clients,
            min_train_nodes=sites,
            min_available_nodes=task.clients,
            fraction_evaluate=0.0,
        )
        strategy.start(
            grid,
            ArrayRecord(adapter.tensors()),
            num_rounds=len(sizes),
            train_config=ConfigRecord({"task": task.model_dump_json(), "cached": cached}),
        )
        marks = [*strategy.begun, time.monotonic()]
        seconds.extend(b - a for a, b in pairwise(marks))

    run_simulation(
        server,
        client,
        num_supernodes=task.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": workers, "log_to_driver": False, "logging_level": 40},
        },
    )
    return seconds
