"""Checkpoints: a run killed at any instant goes on from the last round it committed.

    checkpoints/round-000020.json              the manifest: written last, names all it needs
    checkpoints/<sha256>.safetensors           adapter, delta and slots of one round
    checkpoints/<sha256>.safetensors           a pack: the states of all sites that one round changed

A commit writes only what the round changed. Blobs are named by their content and never altered;
the manifest is put in place when everything it names is durable, so a crash leaves either the old
checkpoint or the new one. A site's latest state may lie in a pack of many rounds ago: a manifest
lists the packs that still hold somebody's latest state, oldest first, and a pack goes when its last
site has moved on. With c of N sites drawn a round, about (N / c) H_c packs are live (H_c harmonic).

Every manifest carries the SHA-256 of its own body and of every blob, and all of them are checked
before anything is used. If the newest checkpoint is damaged, the one before it is taken, and the
result says so; if none is intact, that is an error, never a fresh start.
"""

import contextlib
import functools
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as render_tensors
from torch import Tensor

from fedft.core.errors import EnvironmentFailure, IntegrityError
from fedft.core.files import MIB, Files, NotPlain, disk, open_plain, place, read_plain
from fedft.core.parts import MATRICES
from fedft.core.types import Adapter, Delta, Factors, ServerState, clone, factor_name

SCHEMA = 1
"""Version of the format. Later versions keep the envelope, ``{"sha256", "body": {"schema"}}``."""

_log = logging.getLogger(__name__)

_MANIFEST = re.compile(r"round-(\d{6,})\.json")
_OURS = re.compile(r"round-\d{6,}\.json|[0-9a-f]{64}\.safetensors|\..+\.tmp")
# What a tensor may be called in a file: printable, and short enough for any tool.
_STATE_KEY = re.compile(r"(factors|head|delta|slots)/[^\x00-\x1f\x7f-\x9f]{1,1024}")
_PACK_KEY = re.compile(r"\d{1,9}/\d{1,9}")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One committed round.

    Attributes:
        state: everything that crosses a round boundary.
        extra: what the round loop stored beside it.
        notes: what was found damaged on the way here, one sentence each; empty is the normal case.
    """

    state: ServerState
    extra: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Blob:
    """A file named by its content."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]

    @property
    def name(self) -> str:
        return f"{self.sha256}.safetensors"


@dataclass(frozen=True, eq=False)
class _Manifest:
    """What one checkpoint consists of.

    Attributes:
        factors, delta: module → scale, in the order of the model.
        head, slots: tensor names, in their order.
        packs: blobs of site states, oldest first: a later one overrides an earlier one.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    round: Annotated[int, Field(ge=0)]
    state: _Blob
    factors: Mapping[str, float]
    head: Sequence[str]
    delta: Mapping[str, float]
    slots: Sequence[str]
    packs: Sequence[_Blob]
    extra: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"round-{self.round:06d}.json"

    @property
    def files(self) -> set[str]:
        """Names of all files that this checkpoint needs."""
        return {self.name, self.state.name, *(pack.name for pack in self.packs)}

    def render(self) -> bytes:
        fields = {"schema": SCHEMA} | vars(self)
        fields |= {"state": vars(self.state), "packs": [vars(pack) for pack in self.packs]}
        return _sealed(fields)


_manifest = TypeAdapter(_Manifest)


class _Damaged(Exception):
    """A checkpoint that cannot be used; the text says which file and why."""


class Checkpoints:
    """The checkpoints of one run. Nothing is read before the first call.

    One process commits at a time, which the lock of the run directory sees to.

    Args:
        folder: of the run; made by the first commit.
        keep: how many checkpoints stay on disk, at least 2: the one before the newest is what a
            damaged newest one falls back to.
        files: how to write; tests pass one that crashes.
    """

    def __init__(self, folder: Path, *, keep: int = 2, files: Files | None = None) -> None:
        if keep < 2:
            raise ValueError(f"keep must be at least 2, to have one to fall back to; got {keep}")
        self._folder = folder
        self._keep = keep
        self._files = files or Files()
        self._kept: list[_Manifest] | None = None  # newest first; None until the folder was read
        self._sites = _SiteStates(folder, [], {})

    @property
    def sites(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The latest committed state of every site that has one, read from disk when asked for."""
        self._read()
        return self._sites

    def load(self) -> Checkpoint | None:
        """The newest intact checkpoint, or None where nothing was ever committed.

        Raises:
            IntegrityError: there are checkpoints, and all are damaged.
            EnvironmentFailure: the newest was written by a newer fedft, or cannot be read.
        """
        rounds = _rounds(self._folder)
        notes: list[str] = []
        for index, name in enumerate(rounds):
            try:
                manifest = _read_manifest(self._folder / name)
                state = _read_state(self._folder, manifest)
                sites = _SiteStates.read(self._folder, manifest.packs)
            except _Damaged as damage:
                notes.append(f"{name}: {damage}")
                continue
            for note in notes:
                _log.warning("damaged checkpoint %s; going on from round %d", note, state.round)
            self._sites = sites
            self._kept = [manifest, *_parsable(self._folder, rounds[index + 1 :])]
            return Checkpoint(state, manifest.extra, tuple(notes))
        if rounds != _rounds(self._folder):
            return self.load()  # a server at work replaced them under this reader's eyes
        if notes:
            raise IntegrityError(
                f"no checkpoint in {self._folder} is intact: {'; '.join(notes)}",
                fix="Restore the folder from a copy, or start the run anew in another folder.",
            )
        self._kept = []
        return None

    def commit(
        self,
        state: ServerState,
        sites: Mapping[str, Mapping[str, Tensor]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Makes a round durable, then removes what no kept checkpoint needs.

        Args:
            state: of the round.
            sites: site name → tensors, of the sites whose state this round changed. Each replaces
                the site's earlier state as a whole; all other sites keep theirs.
            extra: JSON values to come back with :meth:`load`. NaN and infinities are kept.

        Raises:
            EnvironmentFailure: the disk refused. The previous checkpoint is intact, and a later
                commit may succeed.
            ValueError: the round lies before the last committed one, or a name cannot be stored.
        """
        kept = self._read()
        if kept and state.round < kept[0].round:
            raise ValueError(f"round {state.round} after round {kept[0].round}: rounds only go up")
        with disk(f"create {self._folder}"):
            self._files.mkdir(self._folder)
            self._files.sync_folder(self._folder.parent)

        blob = self._put(_render_state(state))
        pack = self._put(_render_pack(sites)) if sites else None
        packs = self._sites.packs_after(sites, pack) if sites and pack else self._sites.packs
        manifest = _describe(state, blob, packs, extra or {})
        self._sync()
        place(self._files, self._folder / manifest.name, manifest.render())
        self._sync()

        earlier = [m for m in kept if m.round < manifest.round]
        self._kept = [manifest, *earlier][: self._keep]
        if sites and pack:
            self._sites.move(sites, pack)
        self._prune()

    def _read(self) -> list[_Manifest]:
        if self._kept is None:
            self.load()
        assert self._kept is not None
        return self._kept

    def _put(self, data: bytes) -> _Blob:
        # An existing file of this name is written again: it may be the damaged one that made the
        # run fall back to the round before.
        blob = _Blob(hashlib.sha256(data).hexdigest(), len(data))
        place(self._files, self._folder / blob.name, data)
        return blob

    def _sync(self) -> None:
        with disk(f"write {self._folder}"):
            self._files.sync_folder(self._folder)

    def _prune(self) -> None:
        """Removes what no kept checkpoint needs. The round is durable by now: no reason to stop."""
        needed = {name for manifest in self._read() for name in manifest.files}
        try:
            spare = [p for p in self._folder.iterdir() if _OURS.fullmatch(p.name)]
            # Manifests first: never one without its blobs.
            for path in sorted(spare, key=lambda p: p.suffix != ".json"):
                if path.name not in needed:
                    self._files.unlink(path)
        except OSError as error:
            _log.warning("cannot remove old checkpoints: %s; trying again next round", error)


class _SiteStates(Mapping[str, Mapping[str, Tensor]]):
    """Which pack holds the latest state of which site.

    Attributes:
        packs: those that hold somebody's latest state, oldest first.
    """

    def __init__(self, folder: Path, packs: Sequence[_Blob], where: dict[str, _Blob]) -> None:
        self.packs = packs
        self._folder = folder
        self._where = where
        self._live = Counter(where.values())
        self._open = functools.lru_cache(maxsize=8)(_Pack)

    @classmethod
    def read(cls, folder: Path, packs: Sequence[_Blob]) -> "_SiteStates":
        """From the packs of a manifest, every one of them checked."""
        where: dict[str, _Blob] = {}
        for blob in packs:
            _check_file(folder / blob.name, blob)
            where |= dict.fromkeys(_Pack(folder / blob.name).sites, blob)
        return cls(folder, packs, where)

    def __getitem__(self, site: str) -> Mapping[str, Tensor]:
        path = self._folder / self._where[site].name
        with disk(f"read {path}"):
            return self._open(path).read(site)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def packs_after(self, sites: Iterable[str], pack: _Blob) -> list[_Blob]:
        """The live packs once the latest state of ``sites`` lies in ``pack``. O(sites + packs)."""
        leaving = Counter(self._where[site] for site in sites if site in self._where)
        return [old for old in self.packs if self._live[old] > leaving[old]] + [pack]

    def move(self, sites: Iterable[str], pack: _Blob) -> None:
        """The same, for good: when the commit that it belongs to is durable."""
        self.packs = self.packs_after(sites, pack)
        for site in sites:
            if site in self._where:
                self._live[self._where[site]] -= 1
            self._where[site] = pack
            self._live[pack] += 1


class _Pack:
    """The states of many sites in one file, read one site at a time.

    Tensors are keyed ``<site's index>/<tensor's index>``. The metadata give the names: sites with
    the index of their layout, and every distinct layout, a list of tensor names, once.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
            names = json.loads(self._file.metadata()["sites"])
            self._layouts: list[list[str]] = names["layouts"]
            self.sites: dict[str, int] = names["sites"]
            self._index = {site: index for index, site in enumerate(self.sites)}
            expected = {
                f"{index}/{i}"
                for index, layout in enumerate(self.sites.values())
                for i in range(len(self._layouts[layout]))
            }
            _check_keys(self._file.keys(), expected, _PACK_KEY)
        except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
            raise _Damaged(f"{path.name} is no pack of client states ({error!r})") from error

    def read(self, site: str) -> dict[str, Tensor]:
        index = self._index[site]
        names = self._layouts[self.sites[site]]
        # A copy: what safetensors returns may be a view of the file.
        return {n: clone(self._file.get_tensor(f"{index}/{i}")) for i, n in enumerate(names)}


def _render_pack(sites: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    layouts: dict[tuple[str, ...], int] = {}
    table = {site: layouts.setdefault(tuple(t), len(layouts)) for site, t in sites.items()}
    names = json.dumps({"layouts": list(layouts), "sites": table})
    tensors = {
        f"{index}/{i}": clone(tensor)
        for index, own in enumerate(sites.values())
        for i, tensor in enumerate(own.values())
    }
    return render_tensors(tensors, metadata={"sites": names})


def _describe(
    state: ServerState, blob: _Blob, packs: Sequence[_Blob], extra: Mapping[str, Any]
) -> _Manifest:
    return _Manifest(
        round=state.round,
        state=blob,
        factors={module: f.scale for module, f in state.adapter.factors.items()},
        head=list(state.adapter.head),
        delta={module: f.scale for module, f in state.delta.items()},
        slots=list(state.slots),
        packs=packs,
        extra=dict(extra),
    )


def _flat(state: ServerState) -> dict[str, Tensor]:
    """All tensors of a state under their names in the file."""
    adapter = state.adapter
    named = {f"factors/{n}": t for n, t in adapter.tensors(MATRICES).items()}
    named |= {f"delta/{n}": t for n, t in Adapter(state.delta).tensors().items()}
    named |= {f"head/{n}": t for n, t in adapter.head.items()}
    named |= {f"slots/{n}": t for n, t in state.slots.items()}
    return named


def _render_state(state: ServerState) -> bytes:
    tensors = _flat(state)
    _check_keys(tensors, tensors, _STATE_KEY)
    # Copies: the file format refuses tensors that share memory, which a strategy is free to do.
    return render_tensors({name: clone(tensor) for name, tensor in tensors.items()})


def _read_state(folder: Path, manifest: _Manifest) -> ServerState:
    path = folder / manifest.state.name
    data = _read_bytes(path, manifest.state.size)
    _check(path, manifest.state, len(data), hashlib.sha256(data).hexdigest())
    try:
        tensors = parse_tensors(data)
        factors = _factors(tensors, "factors", manifest.factors)
        delta = _factors(tensors, "delta", manifest.delta)
        head = {name: tensors[f"head/{name}"] for name in manifest.head}
        slots = {name: tensors[f"slots/{name}"] for name in manifest.slots}
        state = ServerState(Adapter(factors, head), manifest.round, delta, slots)
        _check_keys(tensors, _flat(state), _STATE_KEY)
    except (SafetensorError, KeyError, ValueError) as error:
        raise _Damaged(f"{path.name} is not the state it should be ({error!r})") from error
    return state


def _factors(tensors: Mapping[str, Tensor], section: str, scales: Mapping[str, float]) -> Delta:
    return {
        module: Factors(
            A=tensors[f"{section}/{factor_name(module, 'A')}"],
            B=tensors[f"{section}/{factor_name(module, 'B')}"],
            scale=scale,
            R=tensors.get(f"{section}/{factor_name(module, 'R')}"),
        )
        for module, scale in scales.items()
    }


def _check_keys(keys: Collection[str], expected: Collection[str], allowed: re.Pattern[str]) -> None:
    """Exactly the expected keys, each of them of the allowed form."""
    for key in keys:
        if not allowed.fullmatch(key):
            raise ValueError(f"{key[:80]!r} cannot be the name of a stored tensor")
    if set(keys) != set(expected):
        raise ValueError(f"tensors and names differ: {sorted(set(keys) ^ set(expected))[:3]}")


def _sealed(body: Mapping[str, Any]) -> bytes:
    """A manifest's bytes: its body, and the checksum of the body."""
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({"sha256": digest, "body": body}, indent=1).encode() + b"\n"


def _unsealed(raw: bytes) -> dict[str, Any]:
    """The body, if not one bit of the file has changed."""
    try:
        body = json.loads(raw)["body"]
        intact = _sealed(body) == raw
    except (ValueError, KeyError, TypeError, RecursionError):
        intact, body = False, {}
    if not intact:
        raise _Damaged("the manifest is empty, truncated or altered")
    return body


def _read_manifest(path: Path) -> _Manifest:
    body = _unsealed(_read_bytes(path, _LARGEST_MANIFEST))
    schema = body.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise EnvironmentFailure(
            f"{path} has format {schema}; this fedft reads formats up to {SCHEMA}",
            fix="Install the version of fedft that wrote it, or a newer one.",
        )
    try:
        fields = {name: value for name, value in body.items() if name != "schema"}
        manifest = _manifest.validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise _Damaged(f"the manifest is wrong at {first['loc']}: {first['msg']}") from error
    if schema != SCHEMA or manifest.name != path.name:
        raise _Damaged(f"the manifest is one of round {manifest.round}, format {schema}")
    return manifest


def _parsable(folder: Path, names: Iterable[str]) -> list[_Manifest]:
    """The manifests that can be read; their blobs are looked at when they are needed."""
    found: list[_Manifest] = []
    for name in names:
        with contextlib.suppress(_Damaged):
            found.append(_read_manifest(folder / name))
    return found


def _rounds(folder: Path) -> list[str]:
    """Names of the manifests, newest first."""
    with disk(f"read {folder}"):
        entries = folder.iterdir() if folder.exists() else ()
        matches = [match for entry in entries if (match := _MANIFEST.fullmatch(entry.name))]
    return [match[0] for match in sorted(matches, key=lambda m: int(m[1]), reverse=True)]


_LARGEST_MANIFEST = 256 * MIB


def _read_bytes(path: Path, largest: int) -> bytes:
    with disk(f"read {path}"), _must_exist(path):
        return read_plain(path, largest=largest, within=path.parent)


def _check_file(path: Path, blob: _Blob) -> None:
    with (
        disk(f"read {path}"),
        _must_exist(path),
        open_plain(path, largest=blob.size, within=path.parent) as file,
    ):
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
    _check(path, blob, size, digest)


@contextlib.contextmanager
def _must_exist(path: Path) -> Generator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise _Damaged(f"{path.name} is missing") from error
    except NotPlain as error:
        raise _Damaged(f"{path.name} is not what it should be: {error.strerror}") from error


def _check(path: Path, blob: _Blob, size: int, digest: str) -> None:
    if size != blob.size:
        raise _Damaged(f"{path.name} has {size} bytes instead of {blob.size}")
    if digest != blob.sha256:
        raise _Damaged(f"the content of {path.name} has changed")
