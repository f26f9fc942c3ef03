"""The checkpoint format: what goes in comes out, and damage never passes for state."""

import json
import re
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fedft.server.checkpoints
from fedft.core.digest import state_digest
from fedft.core.errors import EnvironmentFailure, IntegrityError
from fedft.core.files import Files
from fedft.core.types import Adapter, Factors, ServerState
from fedft.server.checkpoints import Checkpoints

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def make_state(round: int, modules: tuple[str, ...] = ("layer.1.query", "layer.0.query")):
    """Order that is not alphabetic, a core in one module, every dtype, odd shapes."""
    g = torch.Generator().manual_seed(round)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    factors = {m: Factors(randn(2, 3), randn(4, 2), 1.0 / 3.0) for m in modules}
    factors[modules[0]] = replace(factors[modules[0]], R=randn(2, 2))
    bits = torch.randint(0, 2, (2, 4), generator=g)
    slots = {f"z/{dtype}".replace("torch.", ""): bits.to(dtype) for dtype in DTYPES}
    slots |= {"count": torch.tensor(round), "empty": torch.zeros(0, 3), "a": randn(2).double()}
    return ServerState(
        Adapter(factors, {"score.weight": randn(2, 4).bfloat16(), "bias": randn(2)}),
        round,
        {"layer.0.query": Factors(randn(5, 3), randn(4, 5), -0.1)},
        slots,
    )


def site(value: float) -> dict[str, torch.Tensor]:
    return {"z.lora_B": torch.full((2, 2), value), "a.step": torch.tensor(int(value))}


def flat(state: ServerState) -> list[tuple[object, ...]]:
    """Everything there is to know of a state, in its order, comparable."""

    def raw(t: torch.Tensor | None):
        return None if t is None else (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist())

    return [
        *((m, raw(f.A), raw(f.B), raw(f.R), f.scale) for m, f in state.adapter.factors.items()),
        *((name, raw(t)) for name, t in state.adapter.head.items()),
        *((m, raw(f.A), raw(f.B), raw(f.R), f.scale) for m, f in state.delta.items()),
        *((name, raw(t)) for name, t in state.slots.items()),
        ("round", state.round),
    ]


def committed(folder: Path, rounds: int) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for round in range(1, rounds + 1):
        sites = {"alice": site(round)} if round % 2 else {"bob": site(round)}
        checkpoints.commit(make_state(round), sites, {"best": round})
    return checkpoints


def test_everything_comes_back_bit_for_bit_and_in_order(tmp_path: Path):
    state = make_state(7)
    extra = {"history": "ab" * 32, "best": {"round": 3, "loss": 0.1}, "nan": float("nan")}
    Checkpoints(tmp_path / "c").commit(state, extra=extra)
    loaded = Checkpoints(tmp_path / "c").load()
    assert loaded is not None
    assert flat(loaded.state) == flat(state)
    assert state_digest(loaded.state) == state_digest(state)
    assert repr(loaded.extra) == repr(extra)
    assert loaded.notes == ()


def test_tensors_may_share_memory_and_be_views(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    state = ServerState(
        Adapter({"m": Factors(base[:2], base.T[:, :2], 2)}), 1, {}, {"same": base, "part": base[1]}
    )
    Checkpoints(tmp_path).commit(state)
    loaded = Checkpoints(tmp_path).load()
    assert loaded is not None
    assert flat(loaded.state) == flat(state)


def test_nothing_committed_is_none(tmp_path: Path):
    assert Checkpoints(tmp_path / "absent").load() is None
    (tmp_path / f"{'0' * 64}.safetensors").write_bytes(b"of a commit that never ended")
    assert Checkpoints(tmp_path).load() is None
    assert dict(Checkpoints(tmp_path).sites) == {}


def test_a_site_keeps_its_latest_state_over_rounds_that_left_it_out(tmp_path: Path):
    checkpoints = committed(tmp_path, 6)
    for view in (checkpoints.sites, Checkpoints(tmp_path).sites):
        assert list(view) == ["alice", "bob"]
        for name, value in (("alice", 5), ("bob", 6)):
            assert list(view[name]) == ["z.lora_B", "a.step"]
            assert torch.equal(view[name]["z.lora_B"], torch.full((2, 2), float(value)))
            assert view[name]["a.step"].item() == value


@pytest.mark.parametrize("restarted", [False, True])
def test_a_pack_stays_until_its_last_site_has_moved_on(tmp_path: Path, restarted: bool):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.commit(make_state(1), {"a": site(1), "b": site(1)})
    checkpoints.commit(make_state(2), {"a": site(2)})
    checkpoints.commit(make_state(3))
    # Two states are kept, and two packs: b's and a's.
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 + 2
    checkpoints = Checkpoints(tmp_path) if restarted else checkpoints
    checkpoints.commit(make_state(4), {"b": site(4)})
    checkpoints.commit(make_state(5))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 + 2
    assert [checkpoints.sites[s]["a.step"].item() for s in ("a", "b")] == [2, 4]


def test_going_back_to_an_earlier_value_is_no_trouble(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    for round, sites in enumerate([{"a": 1, "b": 1}, {"a": 2}, {"a": 1, "b": 1}, {"b": 2}, {}]):
        checkpoints.commit(make_state(round), {name: site(v) for name, v in sites.items()})
        for view in (checkpoints.sites, Checkpoints(tmp_path).sites):
            assert view["a"]["a.step"].item() == [1, 2, 1, 1, 1][round]
            assert view["b"]["a.step"].item() == [1, 1, 1, 2, 2][round]


def test_a_failed_commit_leaves_the_site_table_alone(tmp_path: Path):
    checkpoints = committed(tmp_path, 2)
    with pytest.raises(ValueError, match="only go up"):
        checkpoints.commit(make_state(1), {"alice": site(9)})
    with pytest.raises(ValueError, match="cannot be the name"):
        checkpoints.commit(replace(make_state(3), slots={"a\nb": torch.zeros(1)}))
    assert checkpoints.sites["alice"]["a.step"].item() == 1


class Counting(Files):
    def __init__(self) -> None:
        self.written = 0

    def write(self, descriptor: int, data: memoryview) -> int:
        self.written += len(data)
        return super().write(descriptor, data)


def test_a_commit_writes_what_changed_and_not_what_exists(tmp_path: Path):
    def second_commit(others: int) -> int:
        files, folder = Counting(), tmp_path / str(others)
        checkpoints = Checkpoints(folder, files=files)
        checkpoints.commit(make_state(1), {f"site-{i}": site(i) for i in range(others)})
        files.written = 0
        checkpoints.commit(make_state(2), {"site-1": site(-1)})
        return files.written

    assert second_commit(1000) - second_commit(10) < 16  # digits of the pack's size


def test_site_names_never_become_paths(tmp_path: Path):
    hostile = ["../../x", "/abs", "a\0b", "ü ﹨ %s", ""]
    Checkpoints(tmp_path / "c").commit(make_state(1), {name: site(1) for name in hostile})
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert list(Checkpoints(tmp_path / "c").sites) == hostile


def test_keeps_the_last_two_and_touches_no_file_of_others(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".round-000001.json.tmp").write_text("of a crash")
    committed(tmp_path, 5)
    names = {p.name for p in tmp_path.iterdir()}
    assert {n for n in names if n.endswith(".json")} == {"round-000004.json", "round-000005.json"}
    assert "notes.txt" in names
    assert not [n for n in names if n.endswith(".tmp")]
    # States of rounds 4 and 5; packs of 3 and 4 for round 4, of 4 and 5 for round 5.
    assert len([n for n in names if n.endswith(".safetensors")]) == 2 + 3


def test_keep_is_kept_across_a_restart(tmp_path: Path):
    for round in range(1, 6):
        Checkpoints(tmp_path, keep=3).commit(make_state(round))
    assert len(list(tmp_path.glob("round-*.json"))) == 3
    with pytest.raises(ValueError, match="at least 2"):
        Checkpoints(tmp_path, keep=1)


def newest(folder: Path) -> Path:
    return max(folder.glob("round-*.json"))


def blobs_of_newest_only(folder: Path) -> list[Path]:
    first, second = sorted(folder.glob("round-*.json"))
    before, after = (set(re.findall(r"[0-9a-f]{64}", p.read_text())) for p in (first, second))
    return [
        folder / f"{n}.safetensors"
        for n in after - before
        if (folder / f"{n}.safetensors").exists()
    ]


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"[]", b'{"body": {}}', b"[" * 100_000])
def test_a_damaged_newest_manifest_falls_back_and_says_so(tmp_path: Path, damage: bytes, caplog):
    committed(tmp_path, 3)
    newest(tmp_path).write_bytes(damage)
    checkpoints = Checkpoints(tmp_path)
    loaded = checkpoints.load()
    assert loaded is not None
    assert flat(loaded.state) == flat(make_state(2))
    assert len(loaded.notes) == 1
    assert "round-000003.json" in loaded.notes[0]
    assert "going on from round 2" in caplog.text
    # The round is done again; the damaged file is replaced.
    checkpoints.commit(make_state(3))
    again = Checkpoints(tmp_path).load()
    assert again is not None
    assert (again.state.round, again.notes) == (3, ())


def test_a_blob_that_is_gone_or_changed_falls_back_and_is_written_again(tmp_path: Path):
    for spoil in (Path.unlink, lambda p: p.write_bytes(p.read_bytes()[:-1])):
        folder = tmp_path / str(id(spoil))
        committed(folder, 3)
        own = blobs_of_newest_only(folder)
        assert len(own) == 2  # the state and alice's pack
        for blob in own:
            good = blob.read_bytes()
            spoil(blob)
            loaded = Checkpoints(folder).load()
            assert loaded is not None
            assert loaded.state.round == 2
            assert blob.name in loaded.notes[0]
            # The same round gives a blob of the same name, which must not pass for present.
            checkpoints = Checkpoints(folder)
            checkpoints.load()
            checkpoints.commit(make_state(3), {"alice": site(3)}, {"best": 3})
            assert blob.read_bytes() == good


def test_all_damaged_is_an_error_and_never_round_zero(tmp_path: Path):
    committed(tmp_path, 3)
    for path in tmp_path.glob("round-*.json"):
        path.write_bytes(path.read_bytes()[:40])
    for attempt in (
        Checkpoints(tmp_path).load,
        lambda: Checkpoints(tmp_path).commit(make_state(1)),
    ):
        with pytest.raises(IntegrityError, match=r"round-000003.*round-000002") as error:
            attempt()
        assert error.value.exit_code == 6


def test_a_newer_format_is_refused_with_both_versions(tmp_path: Path):
    committed(tmp_path, 2)
    body = json.loads(newest(tmp_path).read_text())["body"]
    newest(tmp_path).write_bytes(fedft.server.checkpoints._sealed(body | {"schema": 9, "new": 1}))
    with pytest.raises(EnvironmentFailure, match=r"format 9.*up to 1"):
        Checkpoints(tmp_path).load()


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 0},
        {"schema": "1"},
        {"round": 4},
        {"state": {}},
        {"packs": 3},
        {"slots": ["count"]},
        {"head": ["no.such"]},
        {"delta": {}},
        {"factors": {"layer.9": 1.0}},
    ],
)
def test_a_sealed_manifest_that_does_not_fit_its_blobs_is_damage(tmp_path: Path, change):
    committed(tmp_path, 2)
    body = json.loads(newest(tmp_path).read_text())["body"]
    newest(tmp_path).write_bytes(fedft.server.checkpoints._sealed(body | change))
    loaded = Checkpoints(tmp_path).load()
    assert loaded is not None
    assert (loaded.state.round, len(loaded.notes)) == (1, 1)


def every_bit_flip(data: st.DataObject, folder: Path) -> None:
    """Flips one bit of one file of the newest checkpoint; the load must notice."""
    files = [newest(folder), *blobs_of_newest_only(folder)]
    path = data.draw(st.sampled_from(sorted(files)))
    raw = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[position // 8] ^= 1 << position % 8
    original = path.read_bytes()
    path.write_bytes(raw)
    try:
        loaded = Checkpoints(folder).load()
        assert loaded is not None
        assert flat(loaded.state) == flat(make_state(2)), f"{path.name} bit {position}"
        assert len(loaded.notes) == 1
        assert path.name in loaded.notes[0]
    finally:
        path.write_bytes(original)


@pytest.fixture(scope="module")
def three_rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flips")
    committed(folder, 3)
    return folder


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_detected(three_rounds: Path, data: st.DataObject):
    every_bit_flip(data, three_rounds)


@pytest.mark.parametrize("guard", ["_check", "_unsealed"])
def test_the_harness_finds_flips_when_a_checksum_is_not_looked_at(
    three_rounds: Path, guard: str, monkeypatch: pytest.MonkeyPatch
):
    def parse_only(raw: bytes):
        try:
            return json.loads(raw)["body"]
        except (ValueError, KeyError) as error:
            raise fedft.server.checkpoints._Damaged from error

    blind = {"_check": lambda *_: None, "_unsealed": parse_only}
    monkeypatch.setattr(fedft.server.checkpoints, guard, blind[guard])

    @settings(
        max_examples=300, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(data=st.data())
    def attempt(data: st.DataObject) -> None:
        every_bit_flip(data, three_rounds)

    with pytest.raises(AssertionError):
        attempt()


names = st.text(string.printable.strip(), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    modules=st.lists(names, min_size=1, max_size=4, unique=True),
    slots=st.dictionaries(
        names, st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3))
    ),
    scale=st.floats(allow_nan=False),
    round=st.integers(0, 10**7),
)
def test_any_state_comes_back(tmp_path_factory, modules, slots, scale, round):
    folder = tmp_path_factory.mktemp("state")
    g = torch.Generator().manual_seed(round)
    factors = {
        m: Factors(torch.randn(1, 2, generator=g), torch.randn(3, 1, generator=g), scale)
        for m in modules
    }
    drawn = {n: torch.randint(0, 2, s, generator=g).to(d) for n, (d, s) in slots.items()}
    state = ServerState(Adapter(factors), round, factors, drawn)
    Checkpoints(folder).commit(state)
    loaded = Checkpoints(folder).load()
    assert loaded is not None
    assert flat(loaded.state) == flat(state)


def test_a_reader_follows_a_server_that_prunes_under_its_eyes(tmp_path: Path, monkeypatch):
    writer = committed(tmp_path, 2)
    original = fedft.server.checkpoints._read_manifest
    pending = [3, 4]

    def slow(path: Path):
        if pending:
            writer_rounds = list(pending)
            pending.clear()
            for round in writer_rounds:
                writer.commit(make_state(round))
        return original(path)

    reader = Checkpoints(tmp_path)
    monkeypatch.setattr(fedft.server.checkpoints, "_read_manifest", slow)
    loaded = reader.load()
    assert loaded is not None
    assert loaded.state.round == 4
