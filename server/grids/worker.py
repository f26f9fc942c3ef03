"""The worker side of a RayGrid: one process that loads the client app once and serves jobs.

What crosses between driver and worker is in memory only, in Ray's own serialisation.
"""

import copy
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Metadata, MetricRecord, RecordDict

from server.grids.flower import adopt_identity, assemble
from server.grids.serve import Answer, App, RunConfig, answer, context_of, resolve

Record = ArrayRecord | ConfigRecord | MetricRecord


@dataclass(frozen=True)
class Shared:
    """Stands for an ``ArrayRecord`` in the object store."""

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


class Server:
    """The actor's class."""

    def __init__(self) -> None:
        self._setting: Setting
        self._app: App
        self._shared: dict[Any, ArrayRecord] = {}

    def prepare(self, setting: Setting) -> tuple[int, str]:
        """Loads the app. Apart from ``__init__`` so that its errors arrive as they are.

        Returns:
            The process id, and the id of the Ray node it runs on.
        """
        # Before the app is imported: OpenMP reads its setting when it is loaded.
        os.environ.update(setting.environment)
        sys.path += [p for p in setting.paths if p not in sys.path and Path(p).exists()]
        adopt_identity(run_id=setting.run_id)
        self._setting = setting
        self._app = resolve(setting.app)
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(setting.threads)
        ray: Any = sys.modules["ray"]
        return os.getpid(), ray.get_runtime_context().get_node_id()

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
        refs = {r.ref for p in parcels for _, r in p.records if isinstance(r, Shared)}
        missing = [ref for ref in refs if ref not in self._shared]
        self._shared = {ref: record for ref, record in self._shared.items() if ref in refs}
        if missing:
            ray: Any = sys.modules["ray"]
            self._shared.update(zip(missing, ray.get(missing), strict=True))

    def _unpack(self, records: Sequence[tuple[str, Record | Shared]]) -> RecordDict:
        content = RecordDict()
        for name, record in records:
            # A copy each, because a client may change what it was sent; the bytes stay one.
            known = (
                copy.deepcopy(self._shared[record.ref]) if isinstance(record, Shared) else record
            )
            content[name] = known
        return content
