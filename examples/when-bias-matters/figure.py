"""Draws the sweep: bias by local steps, and what removing it gains.

python examples/when-bias-matters/figure.py runs/when-bias-matters -o examples/when-bias-matters/results
"""

import argparse
from pathlib import Path

from fedft.report import charts
from fedft.report.groups import Group, baseline_of, group
from fedft.report.records import load, lookup

ACCURACY = ("eval", "accuracy")


def setting(one: Group) -> tuple[float, int]:
    """Dirichlet's alpha and the local steps of a group of runs."""
    config = next(iter(one.runs.values())).config
    return lookup(config, "data", "partition", "alpha"), lookup(config, "training", "steps")


def draw(groups: list[Group], output: Path) -> None:
    """One SVG of two panels, sharing the axis of local steps."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "fedft"
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    alphas = sorted({setting(one)[0] for one in groups})
    for k, alpha in enumerate(alphas):
        color, shift = charts.PALETTE[k], 1.06 ** (k - 0.5)
        own = sorted((g for g in groups if setting(g)[0] == alpha), key=lambda g: setting(g)[1])
        base = [g for g in own if g.baseline]
        bias = [g.interval(g.means("bias", "relative").values()) for g in base]
        steps = [setting(g)[1] * shift for g in base]
        left.errorbar(
            steps,
            [b.mean for b in bias],
            yerr=[b.half for b in bias],
            color=color,
            marker="o",
            capsize=3,
            label=f"Dirichlet {alpha:g}",
        )
        exact = [g for g in own if g.arm == "fedex-lora"]
        gains = [g.gain(baseline_of(g, groups), *ACCURACY) for g in exact]
        right.errorbar(
            steps,
            [100 * g.mean for g in gains],
            yerr=[100 * g.half for g in gains],
            color=color,
            marker="o",
            capsize=3,
            linestyle="none",
        )
    left.set_ylabel("relative bias of FedAvg-LoRA")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    right.axhline(0, color="#555555", linewidth=0.8)
    right.set_ylabel("FedEx-LoRA − FedAvg-LoRA (points)")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks([2, 8, 32], ["2", "8", "32"])
        ax.set_xlabel("local steps a round")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, format="svg", metadata={"Date": None})


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", required=True, type=Path)
    arguments = parser.parse_args()
    records, _ = load([arguments.folder])
    draw(group(records), arguments.output / "sweep.svg")


if __name__ == "__main__":
    main()
