"""What a run would find out before its first round, without a run: ``fedft plan --check``."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from fedft.core.record.rundir import RunDir
from fedft.core.trial import Verdict
from fedft.server.config import RunConfig
from fedft.server.grids.inline import InlineGrid
from fedft.server.preflight import preflight
from fedft.server.resolve import resolved
from fedft.server.setting import CLIENT_APP, prepare_run


def check(config: RunConfig, stop: Callable[[], bool] = lambda: False) -> Verdict:
    """Load the model once, in this process, and try it on the data.

    Args:
        config: of the run that is planned.
        stop: is asked several times a second whether to stop.

    Returns:
        Which engine would train, and why.

    Raises:
        FedftError: the run would be refused.
    """
    config = resolved(config)
    with tempfile.TemporaryDirectory() as spare, RunDir.create(Path(spare) / "run") as run:
        task = prepare_run(config, run).task
        with InlineGrid(CLIENT_APP, config.fleet.clients) as grid:
            return preflight(grid, task.model_dump_json(), config.training.batch_size, stop)
