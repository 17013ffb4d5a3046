"""The difficulties of the phantom. This module is light, because the command line needs the names for its help."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Difficulty:
    """The settings of a difficulty. The defaults make the easy phantom, where organs differ in brightness.

    Attributes:
        spread: How much patients and days differ, as a multiple of the easy phantom's differences.
        bend_mm: How far the outlines are bent into irregular ones, in millimetres.
        bias: Strength of the bias field, in the logarithm of the intensity.
        noise: Factor on the noise.
        hot_scans: Share of the scans with an arm beside the body that is brighter than the body.
        ghost: Strength of the strongest copy of the slice that breathing leaves along y, as a share of the signal.
        breath_mm: Breathing shifts each slice along y by a random distance with this standard deviation. A third of it
            also blurs the slice along y.
    """

    spread: float = 1.0
    bend_mm: float = 2.8
    bias: float = 0.12
    noise: float = 1.0
    hot_scans: float = 0.0
    ghost: float = 0.0
    breath_mm: float = 0.0


# The values of the hard phantom were found by comparison with real slices: by eye, by the contrast of the organs, and
# by the ratio of the maximum to the median over the body.
DIFFICULTIES = {
    "easy": Difficulty(),
    "hard": Difficulty(spread=1.5, bend_mm=4.0, bias=0.3, noise=1.5, hot_scans=0.5, ghost=0.12, breath_mm=2.5),
}
