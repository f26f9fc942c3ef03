"""Third-party log noise off, unless somebody asks for it."""

import logging
import os
import warnings


def quiet(verbose: bool = False) -> None:
    """Silence progress bars, load reports and telemetry of the libraries below us.

    Sets environment variables, so that worker processes inherit it. With ``verbose`` everything
    speaks as its authors meant it to, apart from telemetry.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if verbose:
        return
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name in ("flwr", "ray", "transformers", "peft", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(ray|flwr|transformers|peft|datasets)\b")
