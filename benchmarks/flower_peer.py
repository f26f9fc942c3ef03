"""A client as users of Flower write them, for Flower's own simulation engine.

As in FlowerTune's examples, the dataset and its partition are made once in a process, and the
rest for every message: the tokenizer, the site's tokenised rows, the base model, the PEFT model
around it, the ``Trainer`` of transformers (:func:`flowertune`).

A tuned peer stands beside it, which trains with :class:`fedft.clients.engines.loop.PeftEngine`, the plain loop
that everything is compared with (:func:`lean`). It may keep what it loads (``cached``), and have
the base in bfloat16 with eager attention, which is how PEFT is fast on a CPU.
"""

# pyright: standard
# transformers and peft are typed in part.
import os
import tempfile
import time
from collections.abc import Mapping
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

from fedft.clients.engines.loop import PeftEngine
from fedft.core.data.batches import batches
from fedft.core.data.partition import Manifest, build
from fedft.core.data.source import RawData, load
from fedft.core.examples import Examples
from fedft.core.models import initial_adapter, load_base, load_tokenizer, resolve, schema
from fedft.core.quiet import quiet
from fedft.core.seeds import torch_generator
from fedft.core.spec import TaskSpec
from fedft.core.text import tokens
from fedft.core.training_table import TrainingSpec
from fedft.core.types import TrainPlan

State = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Bench:
    """What a client with the plain loop makes for a message."""

    rows: Examples
    engine: PeftEngine


def make_bench(task_json: str, index: int) -> Bench:
    """Load everything and tokenise the site's rows."""
    task = TaskSpec.model_validate_json(task_json)
    engine = _engine(task)
    return Bench(_rows(task_json, index), engine)


def _engine(task: TaskSpec) -> PeftEngine:
    classes = len(_dataset(_data_of(task))[0].classes)
    return PeftEngine(
        load_base(task.model, task.lora, classes, precision=task.precision), task.lora
    )


def _rows(task_json: str, index: int) -> Examples:
    task = TaskSpec.model_validate_json(task_json)
    raw, manifest = _dataset(_data_of(task))
    own = raw.train.take(manifest.rows_of(index))
    tokenizer = load_tokenizer(resolve(task.model))
    return tokens.labelled(
        own.values["text"], own.one_label, tokenizer, task.data.max_length
    ).examples


@lru_cache(maxsize=1)
def _kept_engine(task_json: str) -> PeftEngine:
    return _engine(TaskSpec.model_validate_json(task_json))


_kept_rows = lru_cache(maxsize=None)(_rows)


def keep_bench(task_json: str, index: int) -> Bench:
    """The same, kept in this process."""
    return Bench(_kept_rows(task_json, index), _kept_engine(task_json))


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
        labels=raw.train.one_label,
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
    local = lean if about["lean"] else flowertune
    sent = message.content.array_records["arrays"].to_torch_state_dict()
    index = int(context.node_config["partition-id"])
    state, metrics = local(about, sent, index)
    reply = {"arrays": ArrayRecord(state), "metrics": MetricRecord(dict(metrics))}
    return Message(RecordDict(reply), reply_to=message)


def flowertune(
    about: Mapping[str, Any], sent: State, index: int
) -> tuple[State, Mapping[str, float]]:
    """An epoch as FlowerTune's client trains it: everything loaded, PEFT, ``Trainer``."""
    from datasets import Dataset
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    task = TaskSpec.model_validate_json(about["task"])
    raw, manifest = _dataset(_data_of(task))
    own = raw.train.take(manifest.rows_of(index))
    tokenizer = AutoTokenizer.from_pretrained(resolve(task.model))
    encoded = tokenizer(list(own.inputs), truncation=True, max_length=task.data.max_length)
    rows = [
        {"input_ids": ids, "labels": int(label)}
        for ids, label in zip(encoded["input_ids"], own.labels, strict=True)
    ]
    model = _peft_model(task, len(raw.classes))
    set_peft_model_state_dict(model, sent)
    training = TrainingSpec().local()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=int(about["batch-size"]),
                num_train_epochs=1,
                learning_rate=training.lr,
                lr_scheduler_type="constant",
                weight_decay=training.weight_decay,
                max_grad_norm=training.clip_norm or 0.0,
                optim="adamw_torch",
                seed=task.seed + int(about["server-round"]),
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        loss = trainer.train().training_loss
    return get_peft_model_state_dict(model), {"num-examples": float(len(rows)), "loss": loss}


def _peft_model(task: TaskSpec, classes: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        resolve(task.model), num_labels=classes
    )
    lora = task.lora
    targets = list(lora.target_modules)
    config = LoraConfig("SEQ_CLS", r=lora.rank, lora_alpha=int(lora.alpha), target_modules=targets)
    return get_peft_model(model, config)


def lean(about: Mapping[str, Any], sent: State, index: int) -> tuple[State, Mapping[str, float]]:
    """The same epoch in the plain loop."""
    make = keep_bench if about["cached"] else make_bench
    bench = make(str(about["task"]), index)
    task = TaskSpec.model_validate_json(str(about["task"]))
    start = initial_adapter(bench.engine.base.shapes, task.lora, task.lora.rank, task.seed)
    training = TrainingSpec(batch_size=int(about["batch-size"]), epochs=1).local()
    generator = torch_generator(task.seed, "peer", index, int(about["server-round"]))
    every = torch.arange(len(bench.rows)).numpy()
    own = list(batches(bench.rows, every, training.batch_size, generator=generator))
    plan = TrainPlan(start=start.replaced(sent), training=training, site=str(index))
    (result,) = bench.engine.train([plan], [own])
    return dict(result.adapter.tensors()), {
        "num-examples": float(len(bench.rows)),
        "loss": result.metrics["loss"],
    }


def _first_state(task: TaskSpec, *, lean: bool) -> State:
    """What the first round starts from, under the names that the clients use."""
    classes = len(_dataset(_data_of(task))[0].classes)
    if lean:
        shapes = schema(task.model, task.lora, classes)
        return dict(initial_adapter(shapes, task.lora, task.lora.rank, task.seed).tensors())
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(_peft_model(task, classes))


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


def run(
    task: TaskSpec, sites: int, sizes: list[int], *, lean: bool, cached: bool, workers: int
) -> list[float]:
    """Seconds of each round, under Flower's simulation engine with FedAvg.

    Args:
        task: data, model and precision; one Flower node for each of its clients.
        sites: clients a round.
        sizes: batch size of each round; as many rounds.
        lean: whether clients train with the plain loop; otherwise as FlowerTune does.
        cached: of the plain loop: whether clients keep what they load.
        workers: actors, of one CPU each.
    """
    from flwr.simulation import run_simulation

    server = ServerApp()
    seconds: list[float] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < task.clients:
            time.sleep(0.1)
        strategy = Paced(
            sizes,
            fraction_train=sites / task.clients,
            min_train_nodes=sites,
            min_available_nodes=task.clients,
            fraction_evaluate=0.0,
        )
        strategy.start(
            grid,
            ArrayRecord(_first_state(task, lean=lean)),
            num_rounds=len(sizes),
            train_config=ConfigRecord(
                {"task": task.model_dump_json(), "lean": lean, "cached": cached}
            ),
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
