"""The laws of compressors, whatever their settings are: those of their defaults."""

from collections.abc import Iterator

import torch
from flwr.app import Array
from torch import Tensor

from fedft.conformance.laws import Finding, Law, first_line, held, require
from fedft.core.wire.compress import Compressor, Key

_SHAPES = ((), (0,), (1,), (5,), (3, 4), (7, 1, 2), (300,))
_KEY = Key(3, 2, "ann", "x")
_TIMES, _FAR = 600, 7.0


def _drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def it_gives_back_what_it_was_given(one: Compressor) -> None:
    """In its shape, finite, nearer than zero is; and its argument is left as it was."""
    for shape in _SHAPES:
        for dtype in (torch.float32, torch.float64):
            x = _drawn(shape, dtype)
            before = x.clone()
            found = one.decode(one.encode(x, _KEY))
            require(torch.equal(x, before), "it wrote to the tensor that it was given")
            form = (found.dtype, tuple(found.shape))
            require(form == (torch.float32, shape), f"{dtype} {shape} came back as {form}")
            require(bool(found.isfinite().all()), f"{shape} came back with NaN or Inf")
            error, norm = float((found.double() - x).norm()), float(x.double().norm())
            require(error <= norm, f"{shape} of norm {norm:.3g} came back {error:.3g} away")
            zeros = torch.zeros(shape, dtype=dtype)
            require(not bool(one.decode(one.encode(zeros, _KEY)).any()), "zeros became others")
            if one.exact and dtype == torch.float32:
                require(torch.equal(found, x), "exact, and the tensor came back as another")


def bytes_are_those_of_size(one: Compressor) -> None:
    """The bytes and the header of an encoding are those that it announces."""
    for shape in _SHAPES:
        array = one.encode(_drawn(shape), _KEY)
        one.admit("x", array.dtype, array.stype, shape, len(array.data))
        sizes, length = one.size(shape), len(array.data)
        require(
            length in range(sizes[0], sizes[-1] + one.framing + 1),
            f"{shape} takes {length} bytes, and size says {sizes[0]} to {sizes[-1]}",
        )
        require(one.most(shape) == sizes[-1], f"most of {shape} is not the end of its size")


def the_key_is_all_that_it_draws_from(one: Compressor) -> None:
    """The same key gives the same bytes, whatever else was drawn, and nothing global is."""
    x = _drawn((400,))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = one.encode(x, _KEY).data
        require(torch.equal(torch.get_rng_state(), state), "it draws from torch's own generator")
        torch.manual_seed(5)
        require(one.encode(x, _KEY).data == first, "the same key gave other bytes")


def unbiased_is_what_it_says(one: Compressor) -> None:
    """The mean of many encodings is what was encoded."""
    x = _drawn((100,))
    found = [one.decode(one.encode(x, Key(1, k, "ann", "x"))).double() for k in range(_TIMES)]
    drawn = torch.stack(found)
    error = (drawn.mean(0) - x.double()).abs()
    within = _FAR * drawn.std(0) / _TIMES**0.5 + 1e-6 * x.double().abs().max()
    worst = int((error - within).argmax())
    require(
        bool((error <= within).all()),
        f"unbiased, and the mean of {float(x[worst]):.4f} is {float(drawn.mean(0)[worst]):.4f}",
    )


def bytes_of_anybody_are_refused_or_finite(one: Compressor) -> None:
    """Damaged bytes are a ``ValueError``, or some finite tensor of the announced shape."""
    x = _drawn((40,))
    array = one.encode(x, _KEY)
    g = torch.Generator().manual_seed(2)
    for trial in range(60):
        data = bytearray(array.data)
        for _ in range(1 + trial % 4):
            place = int(torch.randint(len(data), (1,), generator=g))
            data[place] = 0xFF if trial % 2 else int(torch.randint(256, (1,), generator=g))
        hostile = Array(array.dtype, array.shape, array.stype, bytes(data))
        try:
            found = one.decode(hostile)
        except ValueError:
            continue
        except Exception as error:
            require(False, f"damaged bytes raised {first_line(error)}, not a ValueError")
        else:
            require(tuple(found.shape) == (40,), "damaged bytes became another shape")
            require(one.cast or bool(found.isfinite().all()), "damaged bytes became NaN or Inf")


LAWS = (
    Law("It gives back what it was given", it_gives_back_what_it_was_given),
    Law("The bytes are those of its size", bytes_are_those_of_size),
    Law("The key is all that it draws from", the_key_is_all_that_it_draws_from),
    Law("The mean over keys is what was encoded", unbiased_is_what_it_says, lambda c: c.unbiased),
    Law("Damaged bytes are refused, or finite", bytes_of_anybody_are_refused_or_finite),
)


def examine(name: str, kind: type[Compressor]) -> Iterator[Finding]:
    """What came of holding a compressor, with the defaults of its table, to every law."""
    made = "It can be made with the defaults of its table"
    try:
        one = kind()
    except Exception as error:
        yield Finding("compressors", name, made, "broken", first_line(error))
        return
    yield Finding("compressors", name, made, "held")
    yield from held("compressors", name, one, LAWS)
