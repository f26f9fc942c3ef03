"""The same run from Python: rules are objects, and can stand beside fedft's own."""

import sys

from fedft_example_plugin.rules import Tempered

import fedft

if __name__ == "__main__":
    config, folder = sys.argv[1:3]
    comparison = fedft.compare(
        config,
        strategies=["fedavg-lora", Tempered(power=0.25)],
        seeds=[0],
        run_dir=folder,
    )
    for run in comparison.runs:
        print(run.directory.name, run.metrics["final"])
