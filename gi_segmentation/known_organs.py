"""Organs that are known by name: their codes in SNOMED CT, their names for people, and how others spell them.

The spellings are those of TG-263 (names for radiotherapy, AAPM), of TotalSegmentator, and those that clinics with
English or German often use.
"""

import re
import unicodedata
from functools import cache
from typing import NamedTuple


class KnownOrgan(NamedTuple):
    """What is known of an organ.

    Attributes:
        code: Its code in SNOMED CT. An organ of one side has that of the organ, which is the same on both sides.
        meaning: The name of the code in SNOMED CT.
        spellings: What planning systems and other programs call it, see `find_organ` for what makes no difference.
    """

    code: str
    meaning: str
    spellings: tuple[str, ...] = ()


# How a side is written, before or after the name of an organ.
SIDES = {
    "left": ("left", "l", "lt", "links", "linke", "linker", "li"),
    "right": ("right", "r", "rt", "rechts", "rechte", "rechter", "re"),
}


def on_both_sides(name: str, code: str, meaning: str, *spellings: str) -> dict[str, KnownOrgan]:
    """Return the left and the right one of two organs, by their names.

    Args:
        name: The name of both, without the side.
        code: Its code.
        meaning: The name of the code.
        spellings: Other names of both, without the side.

    Example:
        >>> [*on_both_sides("kidney", "64033007", "Kidney")]
        ['kidney_left', 'kidney_right']
    """
    pairs = {}
    for side, words in SIDES.items():
        sided = [form for one in (name, *spellings) for word in words for form in (f"{one}_{word}", f"{word}_{one}")]
        pairs[f"{name}_{side}"] = KnownOrgan(code, meaning, tuple(sided[1:]))
    return pairs


# In this order, known organs become labels. A part comes after what it is a part of, because a later label hides an
# earlier one. Names for both sides, such as `Lungs`, are not known: a plan often has them beside those of each side.
KNOWN_ORGANS: dict[str, KnownOrgan] = {
    "large_bowel": KnownOrgan(
        "14742008", "Large intestine", ("bowel_large", "large_intestine", "colon", "kolon", "dickdarm")
    ),
    "small_bowel": KnownOrgan("30315005", "Small intestine", ("bowel_small", "small_intestine", "duenndarm")),
    "stomach": KnownOrgan("69695003", "Stomach", ("magen",)),
    "duodenum": KnownOrgan("38848004", "Duodenum", ("zwoelffingerdarm",)),
    "jejunum": KnownOrgan("21306003", "Jejunum"),
    "ileum": KnownOrgan("34516001", "Ileum"),
    "cecum": KnownOrgan("32713005", "Cecum", ("caecum", "zaekum", "blinddarm")),
    "sigmoid_colon": KnownOrgan(
        "60184004", "Sigmoid colon", ("colon_sigmoid", "sigmoid", "sigma", "colon_sigmoideum", "bowel_sigmoid")
    ),
    "rectum": KnownOrgan("34402009", "Rectum", ("rektum", "enddarm", "mastdarm")),
    "anus": KnownOrgan("53505006", "Anus"),
    "esophagus": KnownOrgan("32849002", "Esophagus", ("oesophagus", "speiseroehre")),
    "liver": KnownOrgan("10200004", "Liver", ("leber",)),
    "gallbladder": KnownOrgan("28231008", "Gallbladder", ("gall_bladder", "gallenblase")),
    "spleen": KnownOrgan("78961009", "Spleen", ("milz",)),
    "pancreas": KnownOrgan("15776009", "Pancreas", ("pankreas", "bauchspeicheldruese")),
    "common_bile_duct": KnownOrgan("79741001", "Common bile duct", ("bile_duct_common", "ductus_choledochus")),
    **on_both_sides("kidney", "64033007", "Kidney", "niere"),
    **on_both_sides("adrenal_gland", "23451007", "Adrenal gland", "adrenal", "glnd_adrenal", "nebenniere"),
    **on_both_sides("ureter", "87953007", "Ureter", "harnleiter"),
    "bladder": KnownOrgan("89837001", "Bladder", ("urinary_bladder", "bladder_urinary", "harnblase", "blase")),
    "prostate": KnownOrgan("41216001", "Prostate", ("prostata",)),
    "urethra": KnownOrgan("13648007", "Urethra", ("harnroehre",)),
    "seminal_vesicles": KnownOrgan(
        "64739004", "Seminal Vesicle", ("seminal_ves", "seminal_vesicle", "samenblase", "samenblasen")
    ),
    **on_both_sides("testis", "40689003", "Testis", "testicle", "hoden"),
    "penis": KnownOrgan("18911002", "Penis"),
    "uterus": KnownOrgan("35039007", "Uterus", ("gebaermutter",)),
    "cervix": KnownOrgan("71252005", "Cervix", ("cervix_uteri", "uterine_cervix", "gebaermutterhals")),
    "vagina": KnownOrgan("76784001", "Vagina", ("scheide",)),
    **on_both_sides("ovary", "15497006", "Ovary", "ovar", "eierstock"),
    **on_both_sides("femur", "71341001", "Femur", "oberschenkelknochen"),
    **on_both_sides(
        "femoral_head", "2812003", "Femoral head", "femur_head", "head_of_femur", "femurkopf", "hueftkopf"
    ),
    "sacrum": KnownOrgan("54735007", "Sacrum", ("os_sacrum", "kreuzbein")),
    "spinal_cord": KnownOrgan("2748008", "Spinal cord", ("cord", "myelon", "rueckenmark", "medulla_spinalis")),
    "heart": KnownOrgan("80891009", "Heart", ("herz",)),
    **on_both_sides("lung", "39607008", "Lung", "lunge"),
    "trachea": KnownOrgan("44567001", "Trachea", ("luftroehre",)),
    "aorta": KnownOrgan("15825003", "Aorta", ("a_aorta",)),
    "inferior_vena_cava": KnownOrgan(
        "64131007", "Inferior vena cava", ("v_venacava_i", "vena_cava_inferior", "ivc", "vci")
    ),
    "superior_vena_cava": KnownOrgan(
        "48345005", "Superior vena cava", ("v_venacava_s", "vena_cava_superior", "svc", "vcs")
    ),
    "portal_vein": KnownOrgan("32764006", "Portal vein", ("v_portal", "vena_portae", "pfortader")),
    "thyroid_gland": KnownOrgan("69748006", "Thyroid", ("thyroid", "glnd_thyroid", "schilddruese")),
    "thymus": KnownOrgan("9875009", "Thymus", ("glnd_thymus",)),
    "sternum": KnownOrgan("56873002", "Sternum", ("brustbein",)),
    **on_both_sides("breast", "76752008", "Breast", "mamma", "brust"),
}
# Words of letters and digits, with separators between them. Other signs have a meaning: in TG-263, `Liver~` is a part
# of the liver, and `_Liver` is no organ but helps to plan. What has such a sign, or a word more than an organ, is not
# the organ.
SEPARATED = re.compile(r"[^\W_]+(?:[\s_.-]+[^\W_]+|[\s_.-]*\([^\W_]+\))*\.?")
# Letters that Germans replace where a system has plain letters only.
GERMAN = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss"})


def find_organ(name: str) -> str | None:
    """Return the usual name here of an organ that has another spelling; None if it is not known.

    Capital letters, accents and the separators between words make no difference. Every word counts: a margin, a ring
    or a target volume of an organ is not the organ.

    Args:
        name: The name of a structure.

    Example:
        >>> find_organ("Bowel_Large"), find_organ("Niere li."), find_organ("RT KIDNEY"), find_organ("Zwölffingerdarm")
        ('large_bowel', 'kidney_left', 'kidney_right', 'duodenum')
        >>> [find_organ(one) for one in ("Stomach_PRV", "PTV_stomach", "stomach ring", "Liver~", "kidney")]
        [None, None, None, None, None]
    """
    text = name.strip()
    return known_spellings().get(spelling_key(text)) if SEPARATED.fullmatch(text) else None


def spelling_key(name: str) -> str:
    """Return what makes a difference between the names of organs.

    Example:
        >>> spelling_key("Kidney_L") == spelling_key("kidney l"), spelling_key("Dünndarm"), spelling_key("Péritoine")
        (True, 'duenndarm', 'peritoine')
    """
    plain = unicodedata.normalize("NFC", name).lower().translate(GERMAN)
    return "".join(letter for letter in unicodedata.normalize("NFKD", plain) if letter.isalnum())


@cache
def known_spellings() -> dict[str, str]:
    """Return the usual name of each organ by the keys of its spellings."""
    return {
        spelling_key(spelling): organ
        for organ, known in KNOWN_ORGANS.items()
        for spelling in (organ, *known.spellings)
    }
