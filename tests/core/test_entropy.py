"""Noise that nobody can find again: its distribution, its keys, and a search that finds torch's."""

import math
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from fedft.core.privacy import entropy
from fedft.core.privacy.entropy import Keystream
from tests.forks import Forks

MANY = 1_000_000
FAR = 6.0
"""Standard errors; a right generator is beyond them twice in a thousand million tests."""


def test_the_stream_is_aes_in_counter_mode() -> None:
    """NIST SP 800-38A, F.5.5: with the initial counter's block, the keystream is E(counter)."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    block = bytes.fromhex("0bdf7df1591716335e9a8b15c860c502")
    assert Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(counter) == block
    ecb = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # ours counts from zero
    expected = b"".join(ecb.update(i.to_bytes(16, "big")) for i in range(300))
    stream = Keystream(key)
    assert stream.bytes(5) + stream.bytes(4795) == expected


def test_each_stream_has_a_key_of_256_bits_from_the_operating_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[int] = []
    real = secrets.token_bytes

    def counted(count: int) -> bytes:
        drawn.append(count)
        return real(count)

    monkeypatch.setattr(secrets, "token_bytes", counted)
    streams = {Keystream().bytes(32) for _ in range(100)}
    entropy.gaussian(10), entropy.gaussian(10)
    assert len(streams) == 100
    assert drawn == [32] * 102


def test_every_bit_of_the_key_changes_the_stream() -> None:
    key = secrets.token_bytes(32)
    streams = {Keystream(key).bytes(32)}
    for bit in range(256):
        other = (int.from_bytes(key, "big") ^ (1 << bit)).to_bytes(32, "big")
        streams.add(Keystream(other).bytes(32))
    assert len(streams) == 257


# ── a search through seeds ────────────────────────────────────────────────────────────────────


def torch_noise(seed: int, count: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator, dtype=torch.float64).numpy()


def philox_noise(seed: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).standard_normal(count)


def keyed_noise(seed: int, count: int) -> np.ndarray:
    return Keystream(seed.to_bytes(32, "big")).normal(count)


def pcg_noise(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count)


def found(
    seen: np.ndarray, maker: Callable[[int, int], np.ndarray], seeds: Iterable[int]
) -> list[int]:
    """The seeds whose stream begins as what was seen; a longer search is only more of this."""
    return [seed for seed in seeds if np.allclose(maker(seed, len(seen)), seen, atol=1e-5)]


SPACE = range(0x5EED0000, 0x5EED1000)
"""A part of the seeds of 32 bits; all of them take a million times as long."""


def test_a_search_through_32_bits_finds_the_noise_of_a_torch_generator() -> None:
    """The control: a seed of 63 bits of the operating system, of which torch keeps the lowest 32."""
    low = secrets.choice(SPACE)
    seed = secrets.randbits(31) << 32 | low
    assert found(torch_noise(seed, 8), torch_noise, SPACE) == [low]


@pytest.mark.parametrize("maker", [torch_noise, philox_noise, pcg_noise, keyed_noise])
def test_the_search_finds_each_generator_that_a_small_number_seeds(
    maker: Callable[[int, int], np.ndarray],
) -> None:
    assert found(maker(SPACE[77], 8), maker, SPACE) == [SPACE[77]]


@pytest.mark.parametrize("maker", [torch_noise, philox_noise, pcg_noise, keyed_noise])
def test_the_same_search_does_not_find_ours(maker: Callable[[int, int], np.ndarray]) -> None:
    torch.manual_seed(SPACE[5])
    np.random.seed(SPACE[5])
    assert found(entropy.gaussian(8).numpy(), maker, SPACE) == []


BEFORE: list[Keystream] = []
"""Of the process that forks: a stream from which something was drawn before."""


def prepare() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    BEFORE[:] = [Keystream()]
    BEFORE[0].bytes(16)


def drawn() -> bytes:
    own = entropy.gaussian(4).numpy().tobytes() + BEFORE[0].normal(4).tobytes()
    return own + torch.randn(4).numpy().tobytes()


def draw(out: Path) -> None:
    out.write_bytes(drawn())


def test_processes_that_are_equal_in_every_state_draw_different_noise(
    forks: Forks, tmp_path: Path
) -> None:
    """Forked, with all their seeds, from one process; a stream that was there before is not shared."""
    forks.here(prepare)
    files = [tmp_path / str(i) for i in range(3)]
    assert [forks.run(draw, file) for file in files] == [0, 0, 0]
    seen = [*(file.read_bytes() for file in files), forks.here(drawn)]
    assert len({one[:32] for one in seen}) == 4
    assert len({one[32:64] for one in seen}) == 4
    assert len({one[64:] for one in seen}) == 1, "the control: torch's own generator is copied"


def test_no_global_generator_is_used_or_changed() -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = entropy.gaussian(8)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(3)
    assert not torch.equal(first, entropy.gaussian(8))


# ── the distribution ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [MANY, 999_999])
def test_moments_lie_within_their_confidence_intervals(count: int) -> None:
    x = entropy.gaussian(count).numpy()
    assert x.shape == (count,)
    assert abs(x.mean()) < FAR / math.sqrt(count)
    assert abs(x.var() - 1) < FAR * math.sqrt(2 / count)
    assert abs((x**3).mean()) < FAR * math.sqrt(15 / count)
    assert abs((x**4).mean() - 3) < FAR * math.sqrt(96 / count)
    assert stats.kstest(x[:100_000], "norm").pvalue > 1e-9


def test_the_intervals_notice_noise_that_is_a_little_off() -> None:
    """The control: noise a hundredth too small, and noise of a lighter tail."""
    x = entropy.gaussian(MANY).numpy()
    assert abs((0.99 * x).var() - 1) > FAR * math.sqrt(2 / MANY)
    uniforms = Keystream().random(12 * MANY).reshape(12, MANY).sum(0) - 6
    assert abs(uniforms.var() - 1) < FAR * math.sqrt(2 / MANY)
    assert abs((uniforms**4).mean() - 3) > FAR * math.sqrt(96 / MANY)


def test_neighbours_do_not_depend_on_each_other() -> None:
    """Also not the two numbers of a pair, which lie half a chunk apart."""
    x = entropy.gaussian(1 << 20).numpy()
    half = entropy._CHUNK // 2
    for lag in (1, 2, half, entropy._CHUNK):
        product = (x[:-lag] * x[lag:]).mean()
        squares = ((x[:-lag] ** 2 - 1) * (x[lag:] ** 2 - 1)).mean()
        assert abs(product) < FAR / math.sqrt(len(x) - lag), lag
        assert abs(squares) < FAR * 2 / math.sqrt(len(x) - lag), lag


def test_tails_go_as_far_as_they_should() -> None:
    x = np.abs(entropy.gaussian(MANY).numpy())
    for bound in (2.0, 3.0, 4.0):
        expected = MANY * math.erfc(bound / math.sqrt(2))
        assert abs((x > bound).sum() - expected) < FAR * math.sqrt(expected), bound

    class Least(Keystream):
        def _words(self, count: int) -> np.ndarray:
            return np.zeros(count, np.uint64) if count == 1 else super()._words(count)

    assert 0 < Least()._positive(1)[0] <= 2.0**-64


@pytest.mark.parametrize("count", [0, 1, 2, 3, entropy._CHUNK - 1, entropy._CHUNK + 1])
def test_any_number_of_numbers_can_be_drawn(count: int) -> None:
    x = entropy.gaussian(count)
    assert x.shape == (count,) and bool(x.isfinite().all())
    u = Keystream().random(count)
    assert u.shape == (count,) and bool(((u >= 0) & (u < 1)).all())


def test_uniform_numbers_are_uniform() -> None:
    u = Keystream().random(MANY)
    counts = np.bincount((u * 256).astype(int), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-9
    assert np.all(u * 2**53 == np.floor(u * 2**53))
