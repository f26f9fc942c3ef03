"""The report: run directories in, one self-contained HTML page out.

    write_report([Path("runs/20260101-120000-lora-fair")], Path("report.html"))
    print(summarise([Path("comparison")]).markdown())

The page holds its style, its figures and its tables; it loads nothing and runs no script, so that
it can be mailed, archived beside a paper, printed, or read on a phone.
"""

from collections.abc import Sequence
from pathlib import Path

from fedft.core.extras import need
from fedft.core.files import disk, write_file
from fedft.report import page
from fedft.report.records import load
from fedft.report.tables import Row, Table, summarise

__all__ = ["Row", "Table", "summarise", "write_report"]


def write_report(run_dirs: Sequence[Path], output: Path, confidence: float | None = None) -> None:
    """Write the report of one run, or of several side by side.

    Args:
        run_dirs: run directories, or folders of them as `fedft compare` makes.
        output: the HTML file; replaced if it exists.
        confidence: level of the intervals; None is 0.95, and none where there is one seed.

    Raises:
        ConfigError: a path is no run directory, nothing has been completed yet, two runs are the
            same, or an interval is asked for where there is one seed.
        IntegrityError: a run directory is damaged.
        EnvironmentFailure: the file cannot be written, or matplotlib is not installed.
    """
    need("report", "a report needs it")
    records, waiting = load(run_dirs)
    if len(records) == 1 and not waiting and confidence is None:
        html = page.of_run(records[0])
    else:
        html = page.of_comparison(records, [path.name for path in waiting], confidence)
    with disk(f"write {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, html.encode())
