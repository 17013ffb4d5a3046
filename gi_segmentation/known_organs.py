"""Organs that are known by name: their codes in SNOMED CT, their names for people, and how others spell them."""

from typing import NamedTuple


class KnownOrgan(NamedTuple):
    """What is known of an organ.

    Attributes:
        code: Its code in SNOMED CT.
        meaning: Its name in SNOMED CT.
        spellings: What planning systems and other programs call it, in lower case with `_` between words. The names of
            TG-263 (AAPM) are among them.
    """

    code: str
    meaning: str
    spellings: tuple[str, ...] = ()


KNOWN_ORGANS: dict[str, KnownOrgan] = {
    "large_bowel": KnownOrgan("14742008", "Large intestine", ("bowel_large", "large_intestine", "colon")),
    "small_bowel": KnownOrgan("30315005", "Small intestine", ("bowel_small", "small_intestine")),
    "stomach": KnownOrgan("69695003", "Stomach"),
}
