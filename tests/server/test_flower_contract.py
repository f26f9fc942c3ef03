"""What we use of Flower beyond its public API, and that Flower's own parts run on our grids.

Where a test here fails after an update of Flower, mend server/grids/flower.py.
"""

import random
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedft.server.grids import flower
from fedft.server.grids.inline import InlineGrid
from fedft.server.grids.ray import RayGrid

# A client that knows nothing of fedft: it adds its partition id and how often it was called.
TOY = """
    import numpy as np
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message, context):
        calls = context.state["calls"]["n"] + 1 if "calls" in context.state else 1
        context.state["calls"] = ConfigRecord({"n": calls})
        step = context.node_config["partition-id"] * context.run_config["lr"] + calls
        arrays = [a + step for a in message.content["arrays"].to_numpy_ndarrays()]
        metrics = MetricRecord({"num-examples": 1, "calls": calls})
        return Message(
            RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message
        )

    @app.evaluate()
    def evaluate(message, context):
        total = sum(float(a.sum()) for a in message.content["arrays"].to_numpy_ndarrays())
        metrics = MetricRecord({"num-examples": 1, "total": total})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "toy_contract_app.py").write_text(textwrap.dedent(TOY))
    monkeypatch.syspath_prepend(tmp_path)
    yield "toy_contract_app:app"
    sys.modules.pop("toy_contract_app", None)


def run_fedavg(grid: Grid) -> tuple[list[np.ndarray], dict[int, float], dict[int, float]]:
    """Three rounds of Flower's FedAvg over three of four nodes."""
    random.seed(5)  # Flower samples from the global generator
    strategy = FedAvg(fraction_train=0.75, fraction_evaluate=0.75, min_available_nodes=4)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros((2, 3), np.float32), np.ones(4, np.float32)]),
        num_rounds=3,
        timeout=60,
    )
    assert result.arrays is not None
    return (
        result.arrays.to_numpy_ndarrays(),
        {r: m["calls"] for r, m in result.train_metrics_clientapp.items()},  # pyright: ignore
        {r: m["total"] for r, m in result.evaluate_metrics_clientapp.items()},  # pyright: ignore
    )


def test_flowers_fedavg_runs_a_foreign_client_app_on_the_inline_grid(toy: str) -> None:
    with InlineGrid(toy, 4, {"lr": 0.3}) as grid:
        arrays, calls, totals = run_fedavg(grid)
    # By hand: each round adds the mean of 0.3 * partition + calls over the sampled nodes.
    rng = random.Random(5)
    value, counts = 0.0, dict.fromkeys(range(1, 5), 0)
    for round_ in (1, 2, 3):
        sampled = rng.sample(range(1, 5), 3)
        rng.sample(range(1, 5), 3)  # for evaluation
        for node in sampled:
            counts[node] += 1
        value += sum(0.3 * (node - 1) + counts[node] for node in sampled) / 3
        assert calls[round_] == pytest.approx(sum(counts[n] for n in sampled) / 3)
        assert totals[round_] == pytest.approx(6 * value + 4 * (1 + value), rel=1e-5)
    np.testing.assert_allclose(arrays[0], np.full((2, 3), value), rtol=1e-5)
    np.testing.assert_allclose(arrays[1], np.full(4, 1 + value), rtol=1e-5)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:unclosed file <_io.*/dev/null:ResourceWarning")
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_flowers_fedavg_gives_the_same_bytes_on_ray(toy: str) -> None:
    with InlineGrid(toy, 4, {"lr": 0.3}) as inline:
        expected = run_fedavg(inline)
    with RayGrid(toy, 4, {"lr": 0.3}, workers=2) as grid:
        found = run_fedavg(grid)
    assert [a.tobytes() for a in found[0]] == [a.tobytes() for a in expected[0]]
    assert found[1:] == expected[1:]


def test_identity_lets_messages_be_made_in_this_process() -> None:
    run_id = flower.adopt_identity()
    message = Message(RecordDict(), 7, "train")
    assert message.metadata.run_id == run_id
    assert flower.adopt_identity(run_id=run_id + 1) == run_id, "an identity that is there stays"


def test_an_empty_run_knows_its_id() -> None:
    assert flower.empty_run(3).run_id == 3


def test_a_stamped_message_passes_its_id_on_to_the_reply() -> None:
    flower.adopt_identity()
    message = Message(RecordDict(), 7, "train")
    assert message.metadata.message_id == ""
    flower.stamp(message, "1-9")
    assert message.metadata.message_id == "1-9"
    reply = Message(RecordDict(), reply_to=message)
    assert reply.metadata.reply_to_message_id == "1-9"
    assert reply.metadata.src_node_id == 7


def test_a_message_is_put_together_from_its_parts() -> None:
    flower.adopt_identity()
    message = Message(RecordDict(), 7, "train", group_id="4")
    content = RecordDict({"c": ConfigRecord({"x": 1})})
    again = flower.assemble(message.metadata, content)
    assert again.content is content
    assert isinstance(again.metadata, Metadata)
    assert (again.metadata.dst_node_id, again.metadata.group_id) == (7, "4")


def test_error_codes_are_flowers() -> None:
    assert flower.APP_RAISED == ErrorCode.CLIENT_APP_RAISED_EXCEPTION == 2
    assert flower.NODE_UNAVAILABLE == ErrorCode.NODE_UNAVAILABLE == 5
    assert flower.APP_CRASHED == ErrorCode.CLIENT_APP_CRASHED == 8


def test_the_grid_interface_is_the_one_we_implement() -> None:
    assert Grid.__abstractmethods__ == {
        "create_message",
        "get_node_ids",
        "pull_messages",
        "push_messages",
        "run",
        "send_and_receive",
        "set_run",
    }
