"""The laws of every compressor, int8 by hand, and what hostile bytes are worth."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from flwr.app import Array
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedft.core.errors import ConfigError, MismatchError, UpdateRejected
from fedft.core.plugins import USER
from fedft.core.wire import codec
from fedft.core.wire.changes import Packing, unpacked
from fedft.core.wire.compress import (
    COMPRESSORS,
    Bf16,
    Compressor,
    Fp32,
    Int8,
    Key,
    compressor_of,
    downward,
    names,
    spelled,
)
from fedft.core.wire.dtypes import NPY
from tests.core.top_k import TopK

KEY = Key(3, 2, "ann", "x")
LARGEST = float(torch.finfo(torch.float32).max)


# ── how far decode(encode(x)) may be from x, entry by entry ───────────────────────────────────


def rounded_to_float32(one: Compressor, x: Tensor) -> Tensor:
    return x.double().abs() * 2.0**-24 + 2.0**-150


def rounded_to_bfloat16(one: Compressor, x: Tensor) -> Tensor:
    return x.double().abs() * 2.0**-8 + 2.0**-134


def a_step(one: Compressor, x: Tensor) -> Tensor:
    """Of its block: the largest magnitude there over 127, as a float32 that is not smaller."""
    assert isinstance(one, Int8)
    flat = x.double().abs().reshape(-1)
    steps = torch.zeros_like(flat)
    for begin in range(0, len(flat), one.block):
        block = slice(begin, begin + one.block)
        steps[block] = flat[block].max() / 127 * (1 + 2.0**-23) + 2.0**-149
    return steps.reshape(x.shape)


def what_is_left_out(one: Compressor, x: Tensor) -> Tensor:
    """The largest entry that is not among the kept ones."""
    assert isinstance(one, TopK)
    ordered = x.double().abs().reshape(-1).sort(descending=True).values
    k = one.count(x.shape)
    left = ordered[k] if k < len(ordered) else torch.zeros(())
    return torch.full(x.shape, float(left), dtype=torch.float64) + rounded_to_float32(one, x)


@dataclass(frozen=True)
class Row:
    """A compressor, its bound, and its bytes for n numbers by hand."""

    one: Compressor
    bound: Callable[[Compressor, Tensor], Tensor]
    size: Callable[[int], int]


ROWS = {
    "fp32": Row(Fp32(), rounded_to_float32, lambda n: 4 * n),
    "bf16": Row(Bf16(), rounded_to_bfloat16, lambda n: 2 * n),
    "int8": Row(Int8(), a_step, lambda n: n + 4 * math.ceil(n / 256)),
    "int8, short blocks": Row(Int8(block=16), a_step, lambda n: n + 4 * math.ceil(n / 16)),
    "top-k": Row(TopK(), what_is_left_out, lambda n: 8 * math.ceil(n / 4)),
}
row = pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
SHAPES = [(), (1,), (0,), (3, 0), (15,), (16,), (17,), (2, 3, 4), (255,), (256,), (257,), (7, 300)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1 + math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def extremes() -> dict[str, Tensor]:
    return {
        "zeros": torch.zeros(300),
        "negative zeros": -torch.zeros(3),
        "all alike": torch.full((300,), -0.1),
        "subnormal": torch.full((20,), 2.0**-149),
        "one subnormal": torch.tensor([0.0, -(2.0**-149), 0.0]),
        "largest": torch.tensor([1e38, -1e38, 1.0, 0.0]),
        "far apart": torch.tensor([1e30, 1e-30, -1e30, -1e-30] * 80),
        "one large among small": torch.cat([torch.full((511,), 1e-4), torch.tensor([1e4])]),
        "below float32": torch.full((20,), 1e-300, dtype=torch.float64),
        "steps of 127": torch.arange(-127.0, 128.0),
    }


# ── the laws ──────────────────────────────────────────────────────────────────────────────────


def test_every_compressor_has_a_row() -> None:
    assert {type(row.one) for row in ROWS.values()} == {*COMPRESSORS, TopK}


@row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_decoded_lies_within_the_bound(
    row: Row, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check_bound(row, drawn(shape, dtype))


@row
@pytest.mark.parametrize("what", extremes())
def test_the_bound_holds_for_extreme_values(row: Row, what: str) -> None:
    check_bound(row, extremes()[what])


def check_bound(row: Row, x: Tensor) -> None:
    before = x.clone()
    decoded = row.one.decode(row.one.encode(x, KEY))
    assert torch.equal(x, before), "its argument is left as it was"
    assert (decoded.dtype, decoded.shape) == (torch.float32, x.shape)
    assert bool(decoded.isfinite().all())
    assert bool(((decoded.double() - x.double()).abs() <= row.bound(row.one, x)).all())


@row
def test_the_bound_is_no_wider_than_needed(row: Row) -> None:
    """The control: twice the error is outside of it."""
    x = drawn((5000,), torch.float64)
    error = (row.one.decode(row.one.encode(x, KEY)).double() - x).abs()
    assert bool((2.1 * error > row.bound(row.one, x)).any())


@row
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_formula_and_the_header_fits(
    row: Row, shape: tuple[int, ...]
) -> None:
    array = row.one.encode(drawn(shape), KEY)
    size, n = len(array.data), math.prod(shape)
    assert row.size(n) in row.one.size(shape) and row.one.most(shape) == row.size(n)
    assert size - row.size(n) in range(row.one.framing + 1)
    assert (array.dtype, array.stype) == (row.one.dtype, row.one.format)
    assert codec.payload_bytes(codec.ArrayRecord({"x": array})) == row.size(n)
    row.one.admit("x", array.dtype, array.stype, shape, size)
    for wrong in (row.size(n) - 1, row.size(n) + row.one.framing + 1):
        with pytest.raises(UpdateRejected) as refused:
            row.one.admit("x", array.dtype, array.stype, shape, wrong)
        assert refused.value.reason == "size"


@row
def test_the_same_key_gives_the_same_bytes_and_no_other_does(row: Row) -> None:
    x = drawn((4000,))
    first = row.one.encode(x, KEY).data
    torch.manual_seed(5)
    assert row.one.encode(x, Key(3, 2, "ann").of("x")).data == first
    others = {
        row.one.encode(x, key).data
        for key in (Key(4, 2, "ann", "x"), Key(3, 1, "ann", "x"), Key(3, 2, "bob", "x"),
                    Key(3, 2, "ann", "y"))
    }  # fmt: skip
    draws = isinstance(row.one, Int8)
    assert len(others - {first}) == (4 if draws else 0)


def test_nothing_global_is_drawn_from() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Int8().encode(drawn((100,)), KEY)
    assert torch.equal(torch.get_rng_state(), before)


FAR = 6.0
"""Standard errors: a right compressor is beyond them twice in a thousand million tests."""
TIMES = 2000


def bias(encode: Callable[[Tensor, Key], Tensor]) -> tuple[float, float]:
    """Mean error in steps of numbers that lie 0.3 of a step above one, and its standard error.

    The first number of the block is 127 steps, so that a step is 1. All others are at one place
    between two steps, where every draw has the variance 0.3 x 0.7.
    """
    x = torch.cat([torch.tensor([127.0]), torch.arange(-100.0, 100.0) + 0.3])
    total = torch.zeros(len(x) - 1, dtype=torch.float64)
    for k in range(TIMES):
        total += (encode(x, Key(0, k, "ann", "x")) - x)[1:].double()
    return float(total.mean()) / TIMES, math.sqrt(0.21 / (TIMES * len(total)))


def test_the_mean_over_keys_is_what_was_encoded() -> None:
    one = Int8()
    mean, error = bias(lambda x, key: one.decode(one.encode(x, key)))
    assert abs(mean) < FAR * error


def test_the_test_of_the_mean_notices_rounding_to_nearest() -> None:
    """The control, and one far weaker: one draw in fifty rounded to nearest."""
    mean, error = bias(lambda x, key: x.round())
    assert abs(mean) > FAR * error
    one = Int8()
    mean, error = bias(
        lambda x, key: x.round() if key.round % 50 == 0 else one.decode(one.encode(x, key))
    )
    assert abs(mean) > FAR * error


@row
def test_unbiased_is_what_it_says(row: Row) -> None:
    """Each entry's own mean, within six of its standard errors; the biased ones are beyond."""
    x = drawn((300,))
    total = torch.zeros(300, dtype=torch.float64)
    for k in range(TIMES):
        total += row.one.decode(row.one.encode(x, Key(1, k, "ann", "x"))).double()
    error = (total / TIMES - x.double()).abs()
    within = row.bound(row.one, x) / 2 / math.sqrt(TIMES) * FAR + x.double().abs() * 2.0**-23
    assert bool((error <= within).all()) == row.one.unbiased


@row
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_one_end_or_the_other(row: Row, number: float) -> None:
    x = drawn((40,))
    x[7] = number
    if row.one.cast:  # it says so, and whoever takes the reply looks
        assert torch.equal(row.one.decode(row.one.encode(x, KEY)).isfinite(), x.isfinite())
        return
    with pytest.raises(MismatchError, match="ann cannot send x"):
        row.one.encode(x, KEY)


def test_a_number_beyond_float32_is_refused() -> None:
    with pytest.raises(MismatchError, match="beyond float32"):
        Int8().encode(torch.tensor([1e39], dtype=torch.float64), KEY)
    edge = torch.tensor([LARGEST, -LARGEST, 0.0])
    decoded = Int8().decode(Int8().encode(edge, KEY))
    assert torch.equal(decoded, edge)


# ── int8 by hand ──────────────────────────────────────────────────────────────────────────────


def test_int8_by_hand() -> None:
    """Where every number is a whole number of steps no draw matters: these are the bytes."""
    x = torch.tensor([63.5, -63.5, 32.0, 0.5, 0.0, *[0.0] * 11, 254.0, -2.0])
    array = Int8(block=16).encode(x, KEY)
    codes = np.array([127, -127, 64, 1, *[0] * 12, 127, -1], np.int8).tobytes()
    assert array.data == codes + np.array([0.5, 2.0], "<f4").tobytes()
    assert torch.equal(Int8(block=16).decode(array), x)


def test_int8_is_the_naive_twin() -> None:
    """Number by number, in Python's own arithmetic."""
    x = drawn((37,), torch.float64)
    noise = torch.rand(37, generator=KEY.generator(), dtype=torch.float64).tolist()
    values = x.tolist()
    expected: list[float] = []
    for begin in range(0, 37, 16):
        largest = max(abs(v) for v in values[begin : begin + 16])
        step = np.float32(largest / 127)
        while float(step) * 127 < largest:
            step = np.nextafter(step, np.float32(np.inf))
        for v, u in zip(values[begin : begin + 16], noise[begin : begin + 16], strict=True):
            expected.append(float(np.float32(float(step) * math.floor(v / float(step) + u))))
    assert Int8(block=16).decode(Int8(block=16).encode(x, KEY)).tolist() == expected


# ── hostile bytes ─────────────────────────────────────────────────────────────────────────────


def with_scale(number: float) -> bytes:
    return bytes(20) + np.array([1.0, number], "<f4").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        with_scale(math.nan), with_scale(math.inf), with_scale(-math.inf), with_scale(-1e-30),
        with_scale(LARGEST), b"\x80" + with_scale(1.0)[1:], with_scale(1.0)[:-1],
        with_scale(1.0) + b"\0", b"",
    ],
)  # fmt: skip
def test_an_encoding_that_nobody_makes_is_refused(data: bytes) -> None:
    one = Int8(block=16)
    assert torch.equal(
        one.decode(Array("int8", (20,), one.format, with_scale(1.0))), torch.zeros(20)
    )
    with pytest.raises(ValueError, match="has"):
        one.decode(Array("int8", (20,), one.format, data))


@row
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_bytes_come_they_are_refused_or_finite_numbers(
    row: Row, data: st.DataObject
) -> None:
    shape = data.draw(st.sampled_from([(), (0,), (3,), (5, 7), (260,)]))
    honest = row.one.encode(drawn(shape), KEY).data
    raw = bytearray(data.draw(st.one_of(st.just(honest), st.binary(max_size=300))))
    for _ in range(data.draw(st.integers(0, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    array = Array(row.one.dtype, shape, row.one.format, bytes(raw))
    try:
        row.one.admit("x", array.dtype, array.stype, shape, len(raw))
        decoded = row.one.decode(array)
    except (ValueError, UpdateRejected):
        return
    assert (tuple(decoded.shape), decoded.dtype) == (shape, torch.float32)
    assert row.one.cast or bool(decoded.isfinite().all())


@row
def test_a_header_that_claims_terabytes_costs_nothing(row: Row) -> None:
    with pytest.raises(UpdateRejected) as refused:
        row.one.admit("x", row.one.dtype, row.one.format, (2**40, 2**20), 500)
    assert refused.value.reason == "size"


@row
@pytest.mark.parametrize("other", ROWS.values(), ids=list(ROWS))
def test_only_what_was_asked_for_is_taken(row: Row, other: Row) -> None:
    array = other.one.encode(drawn((2, 40)), KEY)
    fits = type(row.one) is type(other.one) and row.one == other.one
    try:
        row.one.admit("x", array.dtype, array.stype, array.shape, len(array.data))
    except UpdateRejected as refused:
        assert not fits and refused.reason in ("format", "dtype", "size")
    else:
        assert fits or (row.one.cast and other.one.cast)


# ── a whole reply ─────────────────────────────────────────────────────────────────────────────


@row
def test_a_reply_is_its_tensors_within_the_bound_of_their_changes(row: Row) -> None:
    start = {"a": drawn((40, 3)), "b": drawn((5,))}
    tensors = {name: t + 1e-3 * drawn(tuple(t.shape)) for name, t in start.items()}
    tensors["new"] = drawn((7,))
    arrays, left = Packing(row.one, KEY, start).pack(tensors)
    assert list(arrays) == list(tensors)
    for name, tensor in tensors.items():
        read = unpacked(arrays[name], row.one, start.get(name))
        about = tensor if row.one.cast else tensor - start.get(name, torch.zeros(()))
        within = row.bound(row.one, about) + 2.0**-22 * tensor.abs()
        assert bool(((read - tensor).abs() <= within).all()), name
    assert bool(left) == row.one.stateful


def test_what_was_left_out_is_made_up_for() -> None:
    """Over the rounds the sum of what was sent is the sum of the changes, less what is left."""
    generator = torch.Generator().manual_seed(0)
    left: dict[str, Tensor] = {}
    sent, changed = torch.zeros(60), torch.zeros(60)
    for _ in range(40):
        start = torch.randint(-50, 50, (60,), generator=generator).float()
        change = torch.randint(-9, 10, (60,), generator=generator).float()
        packing = Packing(TopK(), KEY, {"x": start}, left)
        arrays, left = packing.pack({"x": start + change})
        sent += unpacked(arrays["x"], TopK(), start) - start
        changed += change
    assert bool(left["x"].abs().max() > 0)
    assert torch.equal(changed - sent, left["x"]), "exact: all numbers are whole"
    assert float((changed - sent).norm()) < 0.5 * float(changed.norm())


def test_what_is_left_of_another_shape_is_left_alone() -> None:
    packing = Packing(TopK(), KEY, {}, {"x": torch.ones(3)})
    assert packing.pack({"x": torch.ones(4)})[1]["x"].shape == (4,)


@row
def test_the_server_sends_casts_only(row: Row) -> None:
    assert downward(row.one) == (row.one if row.one.cast else Fp32())


# ── names ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("given", [*names(), {"name": "int8", "block": 64}, Int8(block=32)])
def test_a_compressor_is_written_as_it_is_read(given: object) -> None:
    one = compressor_of(given)
    assert compressor_of(spelled(one)) == one
    if not isinstance(given, Compressor):
        assert spelled(one) == given


def test_defaults_are_not_written() -> None:
    assert spelled(Int8(block=256)) == "int8"
    assert compressor_of({"name": "int8"}) == Int8()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("int4", "no compressor is called 'int4'"), ("x" * 5000, "no compressor is called"),
        ("", "no compressor"), (8, "a name is expected"), (None, "a name is expected"),
        ({}, "a name is expected"), ({"name": 3}, "a name is expected"), ([], "a name is expected"),
        ({"name": "int8", "block": 3}, "int8: block = 3"),
        ({"name": "int8", "block": True}, "int8"),
        ({"name": "int8", "blocks": 64}, "int8: blocks"),
        ({"name": "fp32", "block": 64}, "fp32: block"),
        ({"name": "os:system"}, "no compressor"),
    ],
)  # fmt: skip
def test_what_is_no_compressor_is_told(given: object, said: str) -> None:
    with pytest.raises(ConfigError) as told:
        compressor_of(given, USER)
    assert said in told.value.what.replace('"', "'") and len(str(told.value)) < 500


def test_the_wire_of_plain_numbers_is_what_it_was() -> None:
    """Bytes that older versions wrote and read."""
    x = torch.tensor([1.0, -2.5])
    plain = Fp32().encode(x, KEY)
    assert plain.stype == NPY and plain.data == Array(x.numpy()).data
    half = Bf16().encode(x, KEY)
    assert (half.stype, half.data) == ("fedft.bfloat16", b"\x80\x3f\x20\xc0")
