"""The worker side of a grid with worker processes: loads the client app once and serves jobs.

What crosses between driver and worker is in memory only: in Ray's own serialisation, or through a
socket that nobody else holds an end of.
"""

import copy
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Metadata, MetricRecord, RecordDict

from fedft.core.plugins import USER, trust_process
from fedft.server.grids.flower import adopt_identity, assemble
from fedft.server.grids.serve import Answer, App, RunConfig, answer, context_of, resolve

Record = ArrayRecord | ConfigRecord | MetricRecord


@dataclass(frozen=True)
class Shared:
    """Stands for an ``ArrayRecord`` that several messages have in common."""

    ref: Any


@dataclass(frozen=True, eq=False)
class Parcel:
    """A message without what it shares with others."""

    metadata: Metadata
    records: tuple[tuple[str, Record | Shared], ...]


@dataclass(frozen=True)
class Setting:
    """What a worker needs to know once."""

    app: str
    nodes: int
    run_id: int
    run_config: RunConfig
    threads: int
    paths: tuple[str, ...]
    environment: Mapping[str, str]


class Server(ABC):
    """One worker: the app, and the shared arrays of the last job."""

    def __init__(self) -> None:
        self._setting: Setting
        self._app: App
        self._shared: dict[Any, ArrayRecord] = {}

    @abstractmethod
    def _look_up(self, refs: list[Any]) -> list[ArrayRecord]:
        """Shared arrays that this worker does not have yet."""

    def load(self, setting: Setting) -> None:
        """Loads the app. Apart from ``__init__`` so that its errors arrive as they are."""
        # Before the app is imported: OpenMP reads its setting when it is loaded.
        os.environ.update(setting.environment)
        sys.path += [p for p in setting.paths if p not in sys.path and Path(p).exists()]
        trust_process(USER)  # what the driver says, its user has said
        adopt_identity(run_id=setting.run_id)
        self._setting = setting
        self._app = resolve(setting.app)
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(setting.threads)

    def serve(self, parcels: Sequence[Parcel], states: Sequence[RecordDict | None]) -> list[Answer]:
        """Serves one job. One answer a parcel, in their order."""
        self._fetch_shared(parcels)
        messages = [assemble(p.metadata, self._unpack(p.records)) for p in parcels]
        about = self._setting
        contexts = [
            context_of(p.metadata.dst_node_id, about.nodes, about.run_id, about.run_config, state)
            for p, state in zip(parcels, states, strict=True)
        ]
        return answer(self._app, messages, contexts)

    def _fetch_shared(self, parcels: Sequence[Parcel]) -> None:
        """Keeps the shared arrays of this job, which most often is those of the one before."""
        refs = shared_by(parcels)
        missing = [ref for ref in refs if ref not in self._shared]
        self._shared = {ref: record for ref, record in self._shared.items() if ref in refs}
        if missing:
            self._shared.update(zip(missing, self._look_up(missing), strict=True))

    def _unpack(self, records: Sequence[tuple[str, Record | Shared]]) -> RecordDict:
        content = RecordDict()
        for name, record in records:
            # A copy each, because a client may change what it was sent; the bytes stay one.
            known = (
                copy.deepcopy(self._shared[record.ref]) if isinstance(record, Shared) else record
            )
            content[name] = known
        return content


def shared_by(parcels: Sequence[Parcel]) -> list[Any]:
    """The shared arrays that messages refer to, each once."""
    found = (r.ref for p in parcels for _, r in p.records if isinstance(r, Shared))
    return list(dict.fromkeys(found))


class RayServer(Server):
    """The actor's class."""

    def prepare(self, setting: Setting) -> tuple[int, str]:
        """Loads the app; returns the process id, and the id of the Ray node it runs on."""
        self.load(setting)
        return os.getpid(), _ray().get_runtime_context().get_node_id()

    def _look_up(self, refs: list[Any]) -> list[ArrayRecord]:
        return _ray().get(refs)


def _ray() -> Any:
    return sys.modules["ray"]
