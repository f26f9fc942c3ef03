"""What is encoded comes back, and counts as many bytes as the formula says."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from fedft.core.algebra import orthonormal_basis
from fedft.core.types import Adapter, EvalPlan, Factors, LocalTraining, TrainPlan
from fedft.core.wire import codec, dtypes
from fedft.core.wire.compress import Bf16, Cast, Fp32
from fedft.core.wire.dtypes import NPY, NPY_MAGIC

HEAD = "base_model.model.classifier.weight"


def adapter(rank: int = 2, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: Factors(
            torch.randn(rank, 5, generator=generator),
            torch.randn(4, rank, generator=generator),
            0.5,
        )
        for name in ("block.1.q", "block.0.v")
    }
    return Adapter(factors, {HEAD: torch.randn(3, 4, generator=generator)})


def same(x: Adapter, y: Adapter) -> bool:
    a, b = x.tensors(), y.tensors()
    scales = [
        (f.scale, g.scale) for f, g in zip(x.factors.values(), y.factors.values(), strict=True)
    ]
    return (
        list(a) == list(b)
        and all(torch.equal(a[n], b[n]) for n in a)
        and all(s == t for s, t in scales)
    )


@given(st.sampled_from([torch.float32, torch.float64]), st.lists(st.integers(0, 4), max_size=3))
def test_float32_round_trips_bit_for_bit(dtype: torch.dtype, shape: list[int]) -> None:
    tensor = torch.randn(shape, dtype=dtype)
    back = codec.tensors_from(codec.arrays_from({"x": tensor}))["x"]
    assert torch.equal(back, tensor.float())


def test_bfloat16_round_trips_as_rounded_and_takes_half_the_bytes() -> None:
    x = torch.randn(7, 3)
    full, half = codec.arrays_from({"x": x}), codec.arrays_from({"x": x}, Bf16())
    assert torch.equal(codec.tensors_from(half)["x"], x.to(torch.bfloat16).float())
    assert codec.payload_bytes(full) == 7 * 3 * 4 == 2 * codec.payload_bytes(half)
    assert not torch.equal(codec.tensors_from(half)["x"], x)


@given(
    st.sampled_from(["<f4", "<f8", "<f2", "<i8", "<i4", "|u1", "|b1"]),
    st.lists(st.integers(0, 4), max_size=3),
    st.booleans(),
    st.integers(0, 20),
)
def test_any_numpy_array_is_read_as_numpy_reads_it(
    dtype: str, shape: list[int], fortran: bool, lost: int
) -> None:
    """The twin is NumPy's own reader, which takes ten times as long for the size of a factor."""
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    array = Array(np.asfortranarray(values) if fortran else values)
    read, twin = codec.tensor_from(array), array.numpy()
    assert read.is_contiguous()
    assert (read.dtype, tuple(read.shape)) == (torch.as_tensor(twin).dtype, twin.shape)
    assert np.array_equal(read.numpy(), twin)
    if 0 < lost <= values.nbytes:
        short = Array(array.dtype, array.shape, array.stype, array.data[:-lost])
        with pytest.raises(ValueError, match=r"buffer|read"):
            codec.tensor_from(short)


@pytest.mark.parametrize("version", [(2, 0), (3, 0)])
def test_other_versions_of_the_format_are_read_too(version: tuple[int, int]) -> None:
    file = BytesIO()
    np.lib.format.write_array(file, np.arange(6.0).reshape(2, 3), version=version)
    array = Array("float64", (2, 3), NPY, file.getvalue())
    assert codec.tensor_from(array).tolist() == [[0, 1, 2], [3, 4, 5]]


def numbers_under(header_bytes: int) -> bytes:
    """Three numbers in NumPy's format, under a header padded to so many bytes."""
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }".ljust(header_bytes - 1)
    head = NPY_MAGIC + b"\x01\x00" + header_bytes.to_bytes(2, "little")
    return head + f"{header}\n".encode() + np.arange(3, dtype="<f4").tobytes()


@pytest.mark.parametrize(("header_bytes", "remembered"), [(118, True), (9000, False)])
def test_long_headers_are_read_and_not_remembered(header_bytes: int, remembered: bool) -> None:
    dtypes._npy_header.cache_clear()
    array = Array("float32", (3,), NPY, numbers_under(header_bytes))
    assert codec.tensor_from(array).tolist() == [0, 1, 2]
    assert dtypes._npy_header.cache_info().currsize == remembered


def test_another_serialisation_is_not_taken_for_numpys() -> None:
    with pytest.raises(ValueError, match="serialization"):
        codec.tensor_from(Array("float32", (3,), "somebody.elses", numbers_under(118)))


def test_pickled_objects_are_not_read() -> None:
    file = BytesIO()
    np.save(file, np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="OBJECT"):
        codec.tensor_from(Array("object", (1,), NPY, file.getvalue()))


def test_integers_keep_their_dtype() -> None:
    x = torch.arange(4)
    assert torch.equal(codec.tensors_from(codec.arrays_from({"x": x}, Bf16()))["x"], x)


def test_a_train_plan_comes_back_whole() -> None:
    training = LocalTraining(steps=3, lr=0.1, clip_norm=None, proximal_mu=0.5)
    plan = TrainPlan(
        adapter().narrowed((0, 2)), train=frozenset({"B"}), send=frozenset({"B", "head"}), keep=frozenset({"A"}),
        training=training, layers=(0, 2), round=4, site="site-1", seed=9,
    )  # fmt: skip
    back = codec.train_plan(codec.Encoder("{}").train(plan), adapter(seed=1), seed=9)
    assert same(back.start, plan.start)
    assert vars(replace(back, start=plan.start)) == vars(plan)


def test_what_does_not_travel_is_made_from_the_common_seed() -> None:
    common = adapter(seed=1)
    plan = TrainPlan(common.replaced({HEAD: torch.ones(3, 4)}), receive=frozenset({"B", "head"}))
    content = codec.Encoder("{}").train(plan)
    assert not any("lora_A" in name for name in content.array_records["arrays"])
    assert same(codec.train_plan(content, common, 0).start, plan.start)
    # Control: another seed at the other end gives another A.
    assert not same(codec.train_plan(content, adapter(seed=2), 0).start, plan.start)


def test_a_basis_is_made_at_the_other_end() -> None:
    A, B = orthonormal_basis(7, "q", (4, 5), 2)
    start = Adapter({"q": Factors(A, B, 0.5, torch.eye(2))})
    plan = TrainPlan(start, receive=frozenset({"R"}), basis=7)
    content = codec.Encoder("{}").train(plan)
    assert codec.content_bytes(content) == 2 * 2 * 4
    blank = Adapter({"q": Factors(torch.zeros(2, 5), torch.zeros(4, 2), 1.0)})
    assert same(codec.train_plan(content, blank, 0).start, start)


def test_a_base_delta_travels_in_factors_with_its_scale_folded() -> None:
    delta = {"block.0.v": Factors(torch.randn(3, 5), torch.randn(4, 3), 0.25)}
    plan = EvalPlan(adapter(), delta)
    content = codec.Encoder("{}").evaluate(plan)
    back = codec.eval_plan(content, adapter(seed=1))
    assert torch.allclose(
        back.delta["block.0.v"].product(), delta["block.0.v"].product(), atol=1e-6
    )
    assert codec.content_bytes(content) == 4 * (2 * 2 * 9 + 12 + 3 * 9)


def test_one_adapter_in_many_plans_is_one_record() -> None:
    """What lets a grid send a broadcast once."""
    encoder, shared = codec.Encoder("{}"), adapter()
    records: list[ArrayRecord] = [
        encoder.train(TrainPlan(shared, site=f"site-{i}")).array_records["arrays"] for i in range(3)
    ]
    other = encoder.train(TrainPlan(adapter(seed=1))).array_records["arrays"]
    half = encoder.train(TrainPlan(shared, receive=frozenset({"B"}))).array_records["arrays"]
    assert records[0] is records[1] is records[2]
    assert other is not records[0]
    assert half is not records[0]


@pytest.mark.parametrize("dtype", [Fp32(), Bf16()])
def test_on_the_wire_is_what_the_other_side_reads(dtype: Cast) -> None:
    content = codec.Encoder("{}", dtype).train(TrainPlan(adapter()))
    read = codec.train_plan(content, adapter(seed=1), 0).start
    assert same(read, codec.on_the_wire(adapter(), dtype))
