"""Rows 30-41 of the fault catalogue. Each case has its control: the same reply, unharmed, passes."""

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedft.core.errors import UpdateRejected
from fedft.core.terms import Term
from fedft.core.types import Adapter, ClientUpdate, Factors, Site, TrainPlan
from fedft.core.wire import codec
from fedft.core.wire.compress import Bf16
from fedft.core.wire.dtypes import BF16, NPY
from fedft.server.validation import Limits, validate

SITE = Site("site-1", examples=60)
NAME = "base_model.model.q.lora_A.weight"


def plan() -> TrainPlan:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator)
    head = {"base_model.model.classifier.weight": torch.zeros(3, 4)}
    return TrainPlan(Adapter({"q": Factors(A, B, 2.0)}, head), site=SITE.name)


def reply(**metrics: Any) -> RecordDict:
    return codec.reply_content(plan().sent(), 60, {"loss": 1.0, **metrics})


def with_array(array: Array, name: str = NAME) -> RecordDict:
    content = reply()
    content["arrays"] = ArrayRecord({**content.array_records["arrays"], name: array})
    return content


def accepted(content: RecordDict, limits: Limits | None = None) -> ClientUpdate:
    return validate(content, plan(), SITE, limits or Limits())


def test_a_good_reply_is_decoded_whole() -> None:
    update = accepted(reply())
    assert (update.site, update.examples, update.metrics) == ("site-1", 60, {"loss": 1.0})
    for name, tensor in plan().sent().items():
        assert torch.equal(update.tensors[name], tensor)


def rejected(content: RecordDict, reason: str, limits: Limits | None = None) -> None:
    accepted(reply())  # control
    with pytest.raises(UpdateRejected) as caught:
        accepted(content, limits)
    assert caught.value.reason == reason


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(value: float) -> None:
    bad = np.zeros((2, 5), np.float32)
    bad[1, 3] = value
    rejected(with_array(Array(bad)), "nan")


def test_norm_over_the_limit() -> None:
    far = with_array(Array(np.full((2, 5), 1e6, np.float32)))
    accepted(far)  # control: without a limit it passes
    rejected(far, "norm", Limits(update_norm=10.0))


@pytest.mark.parametrize("shape", [(5, 2), (1, 5), (2, 5, 1), (3, 5), (10,), ()])
def test_wrong_also_broadcastable_shapes_and_undeclared_ranks(shape: tuple[int, ...]) -> None:
    rejected(with_array(Array(np.zeros(shape, np.float32))), "shape")


def test_missing_extra_and_swapped_keys() -> None:
    arrays = dict(reply().array_records["arrays"])
    for changed in (
        {k: v for k, v in arrays.items() if k != NAME},
        {**arrays, "base_model.model.x.lora_A.weight": arrays[NAME]},
        {**arrays, "../../x": arrays[NAME]},
        {**arrays, "a\0b": arrays[NAME]},
        {**arrays, "x" * 10**6: arrays[NAME]},
    ):
        content = reply()
        content["arrays"] = ArrayRecord(changed)
        rejected(content, "keys")
    swapped = reply()
    b = NAME.replace("_A", "_B")
    swapped["arrays"] = ArrayRecord({**arrays, NAME: arrays[b], b: arrays[NAME]})
    rejected(swapped, "shape")


@pytest.mark.parametrize("dtype", ["int64", "complex64", "bool", "uint8", "U4"])
def test_a_dtype_that_is_no_float(dtype: str) -> None:
    rejected(with_array(Array(np.zeros((2, 5), dtype))), "dtype")


def test_narrow_floats_are_widened() -> None:
    half = accepted(with_array(Array(np.ones((2, 5), np.float16))))
    assert half.tensors[NAME].dtype == torch.float32
    brain = codec.arrays_from({NAME: torch.ones(2, 5)}, Bf16())[NAME]
    assert torch.equal(accepted(with_array(brain)).tensors[NAME], torch.ones(2, 5))


@pytest.mark.parametrize("examples", [0, -1, float("nan"), 10**12, 61, [60], 1.5])
def test_impossible_example_counts(examples: Any) -> None:
    content = reply()
    content["metrics"] = MetricRecord({"num-examples": examples})
    rejected(content, "examples")


@pytest.mark.parametrize("examples", ["60", True])
def test_example_counts_that_only_look_like_numbers(examples: Any) -> None:
    """Flower's own record refuses to hold them; one that came by another way is refused here."""
    with pytest.raises(TypeError):
        MetricRecord({"num-examples": examples})
    content = reply()
    dict.__setitem__(content.metric_records["metrics"]._data, "num-examples", examples)
    rejected(content, "examples")


def test_metrics_that_are_no_numbers() -> None:
    rejected(reply(loss=float("inf")), "metrics")
    rejected(reply(loss=[1.0, 2.0]), "metrics")
    none = reply()
    del none["metrics"]
    rejected(none, "schema")
    two = reply()
    two["more"] = ArrayRecord(dict(two.array_records["arrays"]))
    rejected(two, "schema")
    config = RecordDict({"config": ConfigRecord({"a": 1})})
    rejected(config, "schema")


def header_of(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def test_a_header_that_claims_terabytes_costs_nothing() -> None:
    body = header_of("(1000000, 1000000)") + bytes(40)
    rejected(with_array(Array("float32", (2, 5), "numpy.ndarray", body)), "format")
    rejected(with_array(Array("float32", (10**6, 10**6), "numpy.ndarray", body)), "shape")


def test_pickles_archives_and_unknown_formats() -> None:
    pickled = b"\x93NUMPY\x01\x00" + header_of("(2, 5)")[8:].replace(b"'<f4'", b"'|O' ") + bytes(40)
    rejected(with_array(Array("float32", (2, 5), "numpy.ndarray", pickled)), "format")
    for magic in (b"PK\x03\x04", b"\x80\x04\x95", b"\x1f\x8b\x08\x00"):
        body = magic + bytes(60)
        rejected(with_array(Array("float32", (2, 5), "numpy.ndarray", body)), "format")
    rejected(with_array(Array("float32", (2, 5), "torch.pickle", bytes(40))), "format")


def test_truncated_and_padded_bodies() -> None:
    whole = codec.arrays_from({NAME: torch.ones(2, 5)})[NAME].data
    for body in (whole[:20], whole + bytes(5000), b""):
        rejected(with_array(Array("float32", (2, 5), "numpy.ndarray", body)), "size")
    rejected(with_array(Array("bfloat16", (2, 5), BF16, bytes(22))), "size")


Damage = Callable[[bytes], bytes]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_bytes_are_rejected_or_are_numbers(data: st.DataObject) -> None:
    """Whatever the bytes, the result is an update of the right shape or a rejection."""
    whole = bytearray(codec.arrays_from({NAME: torch.ones(2, 5)})[NAME].data)
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16", "int8"]))
    stype = data.draw(st.sampled_from(["numpy.ndarray", BF16, "x"]))
    try:
        update = accepted(with_array(Array(dtype, (2, 5), stype, bytes(whole))))
    except UpdateRejected:
        return
    assert update.tensors[NAME].shape == (2, 5)
    assert bool(torch.isfinite(update.tensors[NAME]).all())


# ── records beside the adapter ────────────────────────────────────────────────────────────────


class Told(Term):
    kind: Literal["told"] = "told"
    sends: ClassVar[frozenset[str]] = frozenset({"drift"})


def asked() -> TrainPlan:
    return replace(plan(), terms=(Told(),))


def told(**changed: Array | None) -> RecordDict:
    """A good reply, some tensors of its record replaced, or left out where None."""
    drift = {
        name: torch.full(shape, 0.5) for name, shape in asked().schema("sends")["drift"].items()
    }
    content = codec.reply_content(asked().sent(), 60, {}, records={"drift": drift})
    arrays = {**content.array_records["drift"], **changed}
    content["drift"] = ArrayRecord({name: array for name, array in arrays.items() if array})
    return content


def lied(content: RecordDict, reason: str, limits: Limits | None = None) -> None:
    validate(told(), asked(), SITE, Limits())  # control
    with pytest.raises(UpdateRejected) as caught:
        validate(content, asked(), SITE, limits or Limits())
    assert caught.value.reason == reason


def numbers(value: float = 0.5, shape: tuple[int, ...] = (2, 5), dtype: Any = np.float32) -> Array:
    return Array(np.full(shape, value, dtype))


def test_a_record_is_decoded_whole() -> None:
    update = validate(told(), asked(), SITE, Limits())
    assert {r: set(t) for r, t in update.records.items()} == {"drift": set(asked().sent())}
    assert all(bool((t == 0.5).all()) for t in update.records["drift"].values())
    assert torch.equal(update.tensors[NAME], asked().sent()[NAME])


def test_a_record_is_held_to_its_schema_as_the_adapter_is() -> None:
    lied(reply(), "schema")  # it is missing
    twice = told()
    twice["own-drift"] = twice.array_records["drift"]
    lied(twice, "schema")
    with pytest.raises(UpdateRejected, match="exactly the array records"):
        validate(told(), plan(), SITE, Limits())  # nobody asked for it
    lied(told(**{NAME: None}), "keys")
    lied(told(more=numbers()), "keys")
    lied(told(**{NAME: numbers(shape=(5, 2))}), "shape")
    lied(told(**{NAME: numbers(dtype=np.int64)}), "dtype")
    lied(told(**{NAME: Array("float32", (2, 5), NPY, b"\0" * 100_000)}), "size")
    lied(told(**{NAME: Array("float32", (2, 5), "pickle", b"\0" * 40)}), "format")
    for value in (float("nan"), float("inf")):
        lied(told(**{NAME: numbers(value)}), "nan")
    lied(told(**{NAME: numbers(1e300, dtype=np.float64)}), "nan")  # no number in what rules take


def test_a_record_does_not_get_around_the_bound_on_an_update() -> None:
    limits = Limits(update_norm=10.0)
    validate(told(), asked(), SITE, limits)
    lied(told(**{NAME: numbers(100.0)}), "norm", limits)
