"""The share of the mean update that the task head carries."""

from fedft.core.meters import Curve, Meter, Plot, Round


class HeadShare(Meter):
    """Share of the squared norm; None where nobody moved, and for mixed ranks, which have no mean."""

    key = "head_share"
    needs = "sum"
    plots = (
        Plot(
            title="Share of the task head",
            quantity="Share of the squared norm",
            axis="share",
            low=0.0,
            high=1.0,
            caption="How much of the clients' mean movement is in the task head.",
            curves=(
                Curve(
                    keys=("share",),
                    label="head",
                    name="Share of the task head",
                    title="Share of the task head per round",
                    column="Head share",
                ),
            ),
        ),
    )

    def value(self, round_: Round) -> dict[str, float | None]:
        """Reads the mean and the start; torch is not imported before."""
        from fedft.core.types import part_of

        if any(mean is None for mean in round_.replies.mean_factors().values()):
            return {"share": None}
        start = round_.before.adapter.tensors()
        moved = {
            name: float((mean - start[name].double()).square().sum())
            for name, mean in round_.replies.mean().items()
        }
        total = sum(moved.values())
        head = sum(x for name, x in moved.items() if part_of(name) == "head")
        return {"share": head / total if total else None}
