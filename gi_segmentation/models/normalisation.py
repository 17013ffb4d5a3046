"""How the encoder of a checkpoint expects its input: mean and standard deviation of the channels."""

import math
from collections.abc import Mapping
from typing import Any

CHANNELS = 3
# What an image processor does to an image of 8 bits before it normalises. Most of them scale it to 0 to 1.
MAX_BYTE = 255
PROCESSOR_SETTINGS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "rescale_offset")


def find_normalisation(settings: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, for an image that is scaled to 0 to 1.

    A processor may scale an image of 8 bits to another range, or not normalise it. Every such input is the same as one
    that is scaled to 0 to 1 and then normalised with other numbers.

    Args:
        settings: Settings of an image processor, as its `preprocessor_config.json` has them.

    Raises:
        ValueError: If a setting is missing or has no meaning, or if the range of the input is not known.

    Example:
        >>> find_normalisation({"do_normalize": False})
        ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
        >>> find_normalisation({"image_mean": 127.5, "image_std": 127.5, "do_rescale": False})
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    """
    if settings.get("rescale_offset"):
        raise ValueError("preprocessor_config.json: rescale_offset true is not supported")
    for name in ("do_normalize", "do_rescale"):
        if not isinstance(settings.get(name), bool | None):
            raise ValueError(
                f"preprocessor_config.json: expected true or false as {name}, but got {settings[name]!r:.80}"
            )
    normalises = settings.get("do_normalize", True)
    mean, std = [0.0] * CHANNELS, [1.0] * CHANNELS
    if normalises:
        mean, std = (read_numbers(settings, name) for name in ("image_mean", "image_std"))
    if settings.get("do_rescale", True):
        factor = read_numbers({"rescale_factor": 1 / MAX_BYTE, **settings}, "rescale_factor")[0]
        # 255 / 255 is 1, but 255 times the rounded 1 / 255 need not be.
        greatest = 1.0 if math.isclose(factor * MAX_BYTE, 1) else factor * MAX_BYTE
    elif normalises and max(mean) > 1:
        greatest = float(MAX_BYTE)
    else:
        raise ValueError(
            "preprocessor_config.json: do_rescale is false, so it does not say whether the model takes intensities of "
            "0 to 1 or of 0 to 255; set do_rescale to true and rescale_factor to 0.00392156862745098 for 0 to 1, or "
            "to 1 for 0 to 255"
        )
    mean, std = [one / greatest for one in mean], [one / greatest for one in std]
    if not all(0 <= one <= 1 for one in mean):
        raise ValueError(
            f"preprocessor_config.json: expected an image_mean within the range of the intensities, 0 to "
            f"{greatest:g}, but got {settings['image_mean']!r:.80}; correct image_mean or rescale_factor"
        )
    return mean, std


def read_settings(processor: Any) -> dict[str, Any]:
    """Return the settings of an image processor that `find_normalisation` takes."""
    # An attribute of the class is its default, and None means no.
    return {name: getattr(processor, name, None) for name in PROCESSOR_SETTINGS}


def read_numbers(settings: Mapping[str, Any], name: str) -> list[float]:
    """Return three numbers of an image processor. One number stands for all channels.

    Raises:
        ValueError: If the value is anything else, or not a number that can be used.
    """
    value: Any = settings.get(name)
    numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value] * CHANNELS
    least = -math.inf if name == "image_mean" else 0
    # True and False are numbers to Python.
    usable = [type(one) in (int, float) and least < one < math.inf for one in numbers]
    if len(numbers) != CHANNELS or not all(usable):
        kind = "three numbers" if name.startswith("image") else "a number"
        raise ValueError(
            f"preprocessor_config.json: expected {kind} {'above 0 ' if least == 0 else ''}as {name}, but got "
            f"{value!r:.80}"
        )
    return [float(one) for one in numbers]
