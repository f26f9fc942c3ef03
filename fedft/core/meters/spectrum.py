"""The singular values of the mean update that the clients asked for, layer by layer."""

from fedft.core.meters.base import Meter, Round


class Spectrum(Meter):
    """As ``[rounds] spectrum = true`` asks for it, too. Empty where a factor stays at the clients."""

    key = "spectrum"
    needs = "products"
    when = "evaluation"
    top = True

    def value(self, round_: Round) -> dict[str, list[float]]:
        """Module path → singular values, descending; at one rank at most sum_k r_k are not zero."""
        from fedft.core.meters.gaps import spectra

        return spectra(round_.replies, held=round_.before.adapter.factors)
