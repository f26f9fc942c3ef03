"""All benchmarks, one after another: ``python -m benchmarks``."""

import subprocess
import sys

NAMES = ("cohort", "aggregation", "registered")

for name in NAMES:
    print(f"── {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
