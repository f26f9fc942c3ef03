"""Partitions: complete, reproducible, as flwr-datasets has them, and cheap at a million sites."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedft.core.data.partition import (
    MAX_NAME,
    Manifest,
    build,
    load,
    safe_name,
    site_name,
    split_holdout,
)
from fedft.core.errors import ConfigError, IntegrityError, MismatchError, SecurityRefusal
from fedft.core.spec import PartitionSpec

EXAMPLES = 600
LABELS = np.repeat(np.arange(12), 50)
OWNERS = [f"owner {i % 7}" for i in range(EXAMPLES)]


def built(kind: str, clients: int = 20, seed: int = 0, **keys: object) -> Manifest:
    spec = PartitionSpec.model_validate({"kind": kind, **keys})
    return build(spec, examples=EXAMPLES, clients=clients, seed=seed, labels=LABELS, owners=OWNERS)


CASES = {
    "iid": {},
    "dirichlet": {"alpha": 1.0},
    "shards": {"shards_per_client": 3},
    "natural": {"clients": 7, "column": "owner"},
    "bootstrap": {"rows_per_client": 5},
}


@pytest.mark.parametrize("kind", CASES)
def test_the_arrays_are_in_range_and_in_their_types(kind: str) -> None:
    manifest = built(kind, **CASES[kind])
    assert manifest.offsets.dtype == np.int64 and manifest.rows.dtype == np.int32
    assert manifest.offsets[0] == 0 and manifest.offsets[-1] == len(manifest.rows)
    assert manifest.rows.min() >= 0 and manifest.rows.max() < EXAMPLES
    assert len(manifest) == CASES[kind].get("clients", 20)
    assert manifest.sizes.min() > 0
    got = np.concatenate([manifest.rows_of(i) for i in range(len(manifest))])
    assert np.array_equal(got, manifest.rows)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "natural", "shards"])
def test_every_row_has_one_holder(kind: str) -> None:
    """600 rows are 60 shards of 10, so that shards leave none unused here."""
    assert np.array_equal(np.sort(built(kind, **CASES[kind]).rows), np.arange(EXAMPLES))


@pytest.mark.parametrize("kind", CASES)
def test_the_seed_decides(kind: str) -> None:
    one, again = (built(kind, seed=5, **CASES[kind]) for _ in range(2))
    other = built(kind, seed=6, **CASES[kind])
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert np.array_equal(one.rows, again.rows) and np.array_equal(one.offsets, again.offsets)
    # Owners are a fact, not a draw.
    assert np.array_equal(one.rows, other.rows) == (kind == "natural")


def test_no_global_random_state_is_used() -> None:
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    for kind in CASES:
        built(kind, **CASES[kind])
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


def test_iid_is_flwr_datasets_cut_of_the_shuffled_rows() -> None:
    import datasets
    from flwr_datasets.partitioner import IidPartitioner

    manifest = built("iid", clients=7)
    partitioner = IidPartitioner(7)
    partitioner.dataset = datasets.Dataset.from_dict({"row": manifest.rows})
    for site in range(7):
        assert partitioner.load_partition(site)["row"][:] == manifest.rows_of(site).tolist()


def test_natural_is_flwr_datasets_grouping() -> None:
    import datasets
    from flwr_datasets.partitioner import NaturalIdPartitioner

    manifest = built("natural", **CASES["natural"])
    partitioner = NaturalIdPartitioner("owner")
    partitioner.dataset = datasets.Dataset.from_dict({"row": range(EXAMPLES), "owner": OWNERS})
    for site in range(7):
        assert partitioner.load_partition(site)["row"][:] == manifest.rows_of(site).tolist()
        assert manifest.name_of(site) == safe_name(partitioner.partition_id_to_natural_id[site])


def test_dirichlet_skews_more_with_a_smaller_alpha() -> None:
    def largest_share(alpha: float) -> float:
        manifest = built("dirichlet", alpha=alpha, min_rows=1)
        counts = [np.bincount(LABELS[manifest.rows_of(i)]) for i in range(20)]
        return float(np.mean([c.max() / c.sum() for c in counts]))

    assert largest_share(0.2) > largest_share(2.0) > largest_share(200.0)


def test_dirichlet_respects_the_minimum() -> None:
    assert built("dirichlet", alpha=1.0, min_rows=10).sizes.min() >= 10


@pytest.mark.parametrize("seed", range(5))
def test_the_demo_partition_exists(seed: int) -> None:
    """100 clients, 6,120 rows of 12 classes, the default table."""
    labels = np.repeat(np.arange(12), 510)
    manifest = build(PartitionSpec(), examples=6120, clients=100, seed=seed, labels=labels)
    assert len(manifest) == 100 and manifest.sizes.min() >= 4 and manifest.sizes.sum() == 6120


def test_shards_hold_few_classes() -> None:
    manifest = built("shards", shards_per_client=2, clients=12)
    classes = [len(np.unique(LABELS[manifest.rows_of(i)])) for i in range(12)]
    assert max(classes) <= 3 and set(manifest.sizes.tolist()) == {50}


def test_skew_by_a_column_where_there_are_no_classes() -> None:
    spec = PartitionSpec(kind="dirichlet", alpha=0.5, column="owner", min_rows=1)
    manifest = build(spec, examples=EXAMPLES, clients=10, seed=0, owners=OWNERS)
    owners = np.array(OWNERS)
    shares = [
        np.unique(owners[manifest.rows_of(i)], return_counts=True)[1].max() / manifest.sizes[i]
        for i in range(10)
    ]
    assert np.mean(shares) > 0.3  # 1/7 without skew


# What cannot be


@pytest.mark.parametrize(
    ("kind", "keys", "says", "fix"),
    [
        ("iid", {"clients": 601}, "601 clients", "fleet.clients = 600"),
        ("dirichlet", {"clients": 200, "min_rows": 4}, "need 800 rows", "fleet.clients = 150"),
        ("shards", {"clients": 301}, "602 rows", "fleet.clients = 300"),
        ("natural", {"clients": 100, "column": "owner"}, "7 distinct", "fleet.clients = 7"),
    ],
)
def test_more_clients_than_the_rows_allow(kind: str, keys: dict, says: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        built(kind, **keys)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    "keys", [{"alpha": 0.05, "min_rows": 4}, {"alpha": 0.3, "min_rows": 25, "clients": 22}]
)
def test_an_unreachable_minimum_is_answered_with_what_works(keys: dict) -> None:
    with pytest.raises(ConfigError, match="at least min-rows") as caught:
        built("dirichlet", **keys)
    name, value = caught.value.fix.removeprefix("set ").split(" = ")
    key = name.rsplit(".", 1)[1].replace("-", "_")
    advised = keys | {key: float(value) if key == "alpha" else int(value)}
    assert built("dirichlet", **advised).sizes.min() >= advised["min_rows"]


def test_a_missing_column_and_missing_classes_are_told() -> None:
    with pytest.raises(ConfigError, match="column"):
        build(PartitionSpec(kind="natural"), examples=5, clients=2, seed=0)
    with pytest.raises(ConfigError, match="one class a row") as caught:
        build(PartitionSpec(kind="shards"), examples=5, clients=2, seed=0)
    assert "data.partition.column" in caught.value.fix


def test_no_rows_at_all() -> None:
    with pytest.raises(ConfigError, match="no training rows"):
        build(PartitionSpec(kind="bootstrap"), examples=0, clients=2, seed=0)


# Names


def test_numbered_names_sort_like_their_numbers_and_lead_back() -> None:
    manifest = built("bootstrap", clients=1000)
    names = [manifest.name_of(i) for i in range(1000)]
    assert names[42] == "site-0042" and names == sorted(names)
    assert [manifest.index_of(name) for name in names] == list(range(1000))


@pytest.mark.parametrize(
    "name", ["site-42", "site-1000", "site-00042", "site-", "42", "", "site-٠٠٤٢", "site-9" * 9]
)
def test_other_spellings_are_no_site(name: str) -> None:
    with pytest.raises(KeyError):
        built("bootstrap", clients=1000).index_of(name)


def test_named_sites_lead_back() -> None:
    manifest = built("natural", **CASES["natural"])
    assert [manifest.index_of(manifest.name_of(i)) for i in range(7)] == list(range(7))
    for unknown in ("owner", "zzz", "", "owner_209"):
        with pytest.raises(KeyError):
            manifest.index_of(unknown)


def test_a_site_that_is_not_there() -> None:
    manifest = built("iid")
    for index in (-1, 20):
        with pytest.raises(IndexError):
            manifest.rows_of(index)
        with pytest.raises(IndexError):
            manifest.name_of(index)


@given(st.text(min_size=1, max_size=30))
def test_a_safe_name_is_a_file_name_or_refused(value: str) -> None:
    try:
        name = safe_name(value)
    except SecurityRefusal:
        return
    assert name.isascii() and not name.startswith(".") and 0 < len(name) <= MAX_NAME
    assert all(c.isalnum() or c in "._-" for c in name)


@pytest.mark.parametrize(
    "value", ["../x", "/abs", "a/b", "a\\b", ".hidden", "..", "a\0b", "", "x" * 101, "x" * 10**6]
)
def test_names_that_could_be_paths_are_refused(value: str) -> None:
    with pytest.raises(SecurityRefusal):
        safe_name(value)
    with pytest.raises(SecurityRefusal):
        build(
            PartitionSpec(kind="natural", column="c"),
            examples=2, clients=2, seed=0, owners=["fine", value],
        )  # fmt: skip


def test_owners_that_give_one_name_are_refused() -> None:
    assert safe_name("a b") == "a_20b" == safe_name("a_20b")
    with pytest.raises(ConfigError, match="same client name"):
        build(
            PartitionSpec(kind="natural", column="c"),
            examples=2, clients=2, seed=0, owners=["a b", "a_20b"],
        )  # fmt: skip


# On disk


@pytest.mark.parametrize("kind", CASES)
def test_saved_and_loaded_it_is_the_same(kind: str, tmp_path: Path) -> None:
    manifest = built(kind, **CASES[kind])
    manifest.save(tmp_path)
    back = load(tmp_path, manifest.fingerprint)
    back.verify()
    assert (back.origin, back.fingerprint) == (manifest.origin, manifest.fingerprint)
    assert isinstance(back.rows, np.memmap) and np.array_equal(back.rows, manifest.rows)
    assert np.array_equal(back.offsets, manifest.offsets)
    assert [back.name_of(i) for i in range(7)] == [manifest.name_of(i) for i in range(7)]


def test_saving_again_replaces(tmp_path: Path) -> None:
    built("natural", **CASES["natural"]).save(tmp_path)
    second = built("iid")
    second.save(tmp_path)
    back = load(tmp_path)
    back.verify()
    assert back.fingerprint == second.fingerprint and back.names is None


def test_rows_cannot_be_changed_through_a_loaded_manifest(tmp_path: Path) -> None:
    built("iid").save(tmp_path)
    manifest = load(tmp_path)
    manifest.rows_of(0)[:] = -1
    assert manifest.rows_of(0).min() >= 0


def test_another_partition_is_refused(tmp_path: Path) -> None:
    built("iid", seed=0).save(tmp_path)
    with pytest.raises(MismatchError, match="not the run's"):
        load(tmp_path, built("iid", seed=1).fingerprint)


def test_a_changed_row_is_found(tmp_path: Path) -> None:
    built("iid").save(tmp_path)
    rows = np.load(tmp_path / "rows.npy")
    rows[[0, 1]] = rows[[1, 0]]
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(IntegrityError, match="fingerprint"):
        load(tmp_path).verify()


def test_a_changed_origin_is_found(tmp_path: Path) -> None:
    built("iid").save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 9}))
    with pytest.raises(IntegrityError, match="fingerprint"):
        load(tmp_path).verify()


@pytest.mark.parametrize("name", ["offsets.npy", "rows.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "noise"])
def test_damaged_files_are_an_integrity_error(name: str, damage: str, tmp_path: Path) -> None:
    built("iid").save(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "half": content[:40], "noise": b"[1]" * 99}[damage])
    with pytest.raises(IntegrityError, match="cannot be read"):
        load(tmp_path)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    built("iid").save(tmp_path)
    np.save(tmp_path / "rows.npy", np.array([{"an": "object"}]), allow_pickle=True)
    with pytest.raises(IntegrityError):
        load(tmp_path)


def test_a_million_sites_are_three_arrays(tmp_path: Path) -> None:
    spec = PartitionSpec(kind="bootstrap", rows_per_client=2)
    manifest = build(spec, examples=1000, clients=10**6, seed=0)
    manifest.save(tmp_path)
    back = load(tmp_path)
    assert back.index_of(back.name_of(999_999)) == 999_999
    assert len(back.rows_of(999_999)) == 2
    assert {p.name: p.stat().st_size for p in tmp_path.glob("*.npy")} == {
        "offsets.npy": 128 + 8 * (10**6 + 1),
        "rows.npy": 128 + 4 * 2 * 10**6,
    }


# A site's own hold-out


@settings(max_examples=50)
@given(st.integers(1, 80), st.floats(0, 0.9), st.integers(0, 5))
def test_holdout_divides_the_rows(count: int, fraction: float, seed: int) -> None:
    rows = np.arange(100, 100 + count, dtype=np.int32)
    train, held = split_holdout(rows, fraction, seed, "site-1")
    assert len(held) == int(count * fraction)
    assert sorted([*train.tolist(), *held.tolist()]) == rows.tolist()
    again = split_holdout(rows, fraction, seed, "site-1")
    assert np.array_equal(train, again[0]) and np.array_equal(held, again[1])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.floats(0, 0.9))
def test_a_row_held_twice_is_never_on_both_sides(values: list[int], fraction: float) -> None:
    rows = np.array(values, np.int32)
    train, held = split_holdout(rows, fraction, 0, "s")
    assert not set(train.tolist()) & set(held.tolist())
    # The server counts on no more than this (Site.examples).
    assert 0 < len(train) <= len(rows) - int(len(rows) * fraction)


def test_holdout_goes_by_seed_and_site() -> None:
    rows = np.arange(50, dtype=np.int32)
    drawn = {
        tuple(split_holdout(rows, 0.2, seed, site)[1].tolist())
        for seed in (0, 1) for site in ("a", "b")
    }  # fmt: skip
    assert len(drawn) == 4


def test_site_names_are_as_wide_as_the_count() -> None:
    assert site_name(7, 100) == "site-007"
