"""Times that were measured on one card, as they would be on another: an estimate."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..peak_flops import peak_flops


@dataclass(frozen=True)
class Card:
    """A graphics card that the dry run tells times of."""

    name: str
    """Its name in `peak_flops.py`."""
    bandwidth: float
    """GB/s at which it reads its own memory, as NVIDIA publishes it."""


CARDS = {
    "H100": Card("H100 80GB HBM3", 3350.0),  # data sheet of the H100, for the module SXM
    "RTX 4090": Card("GeForce RTX 4090", 1008.0),  # white paper: NVIDIA Ada, V2.02
    "RTX 3090": Card("GeForce RTX 3090", 936.0),  # white paper: NVIDIA Ampere GA102, V2
}
"""Short name → card."""

HOW_ESTIMATED = (
    "estimated, by the ratio of memory bandwidths for drawing tokens and by that of bf16 peaks for "
    "everything else; more likely too long than too short, since the H100 runs far below its peak"
)


def times_on(
    card: Card, measured_on: Card, seconds: Mapping[str, float], decoding: Mapping[str, float]
) -> dict[str, float]:
    """Estimate times on a card, in seconds, from those that were measured on another.

    For every token that is drawn, all weights and the KV cache are read, which the bandwidth of the
    memory bounds; the products of matrices bound everything else. `decoding` has the seconds of
    each time that go into drawing tokens.
    """
    slower_memory = measured_on.bandwidth / card.bandwidth
    peaks = [peak_flops(each.name, "bfloat16") for each in (measured_on, card)]
    slower_products = peaks[0] / peaks[1]

    def on_card(total: float, drawing: float) -> float:
        return drawing * slower_memory + (total - drawing) * slower_products

    return {name: on_card(total, decoding.get(name, 0)) for name, total in seconds.items()}
