"""The same run from Python: rules are objects, tasks and methods are classes; all stand beside fedft's own."""

import sys

from fedft_example_plugin.methods import Sparse
from fedft_example_plugin.rules import Tempered
from fedft_example_plugin.tasks import SmoothedClassification

import fedft

if __name__ == "__main__":
    config, folder = sys.argv[1:3]
    comparison = fedft.compare(
        config,
        strategies=["fedavg-lora", Tempered(power=0.25)],
        seeds=[0],
        settings={"model.task": SmoothedClassification, "training.method": Sparse},
        run_dir=folder,
    )
    for run in comparison.runs:
        print(run.directory.name, run.metrics["final"])
