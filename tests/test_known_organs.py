"""Known organs have the codes of SNOMED CT, and are found by their usual spellings and by no other name."""

from collections import defaultdict

import pytest
from pydicom.sr.codedict import codes

from gi_segmentation.known_organs import KNOWN_ORGANS, find_organ, spelling_key
from gi_segmentation.labels import GI_TRACT, check_name


def test_each_code_has_its_name_in_the_dictionary_of_dicom() -> None:
    meanings = defaultdict(set)
    for name in codes.SCT.dir():
        code = getattr(codes.SCT, name)
        meanings[code.value].add(code.meaning)
    for organ, known in KNOWN_ORGANS.items():
        assert known.meaning in meanings[known.code], organ


def test_each_spelling_is_that_of_one_organ() -> None:
    organs = defaultdict(set)
    for organ, known in KNOWN_ORGANS.items():
        check_name(organ)
        for spelling in (organ, *known.spellings):
            organs[spelling_key(spelling)].add(organ)
            assert find_organ(spelling) == organ
    assert [found for found in organs.values() if len(found) > 1] == []
    # Those of Kaggle come first, in their order.
    assert tuple(KNOWN_ORGANS)[: len(GI_TRACT.names)] == GI_TRACT.names


@pytest.mark.parametrize(
    ("organ", "names"),
    [
        ("large_bowel", "Bowel_Large, large bowel, LargeBowel, colon, Dickdarm"),
        ("small_bowel", "Bowel_Small, small_bowel, Dünndarm, Duenndarm"),
        ("stomach", "Stomach, STOMACH,  stomach , Magen"),
        ("esophagus", "Esophagus, oesophagus, Oesophagus, Speiseröhre, Ösophagus"),
        ("sigmoid_colon", "Colon_Sigmoid, Sigmoid, sigma"),
        (
            "kidney_left",
            "Kidney_L, kidney_left, left kidney, Lt Kidney, L_Kidney, Niere links, linke Niere, Kidney (L)",
        ),
        ("kidney_right", "Kidney_R, kidney_right, Right Kidney, RT_KIDNEY, Niere re., rechte Niere, kidney-right"),
        ("adrenal_gland_left", "Glnd_Adrenal_L, adrenal_gland_left, Nebenniere li"),
        ("femoral_head_right", "Femur_Head_R, FemoralHead_R, Right Femoral Head, Hüftkopf re"),
        ("bladder", "Bladder, urinary_bladder, Harnblase"),
        ("seminal_vesicles", "SeminalVes, Samenblasen"),
        ("spinal_cord", "SpinalCord, spinal_cord, Spinal Cord, Myelon, Rückenmark"),
        ("lung_left", "Lung_L, lung_left, Lunge links"),
        ("inferior_vena_cava", "V_Venacava_I, inferior_vena_cava, IVC"),
        ("thyroid_gland", "Glnd_Thyroid, thyroid_gland, Schilddrüse"),
    ],
)
def test_spellings_of_clinics_and_programs(organ: str, names: str) -> None:
    assert {name: find_organ(name) for name in names.split(",")} == dict.fromkeys(names.split(","), organ)


def test_what_is_no_whole_organ_has_no_name() -> None:
    margins = "Stomach_PRV, PRV_Stomach, Stomach_PRV05, stomach ring, Stomach+5mm, Stomach 2, Stomach_old, zStomach"
    parts = (
        "Liver~, _Liver, Liver-GTV, Liver - PTV, Stomach wall, Kidney_Pelvis_L, Colon_Ascending, lung_upper_lobe_left"
    )
    targets = "PTV_stomach, PTV, GTV liver, CTV_Rectum, GTVp_L, Rectum?, Rectum*, Rectum/Sigmoid"
    others = (
        "kidney, Lung, Bowel, Bowel_Bag, SpinalCanal, Hip_L, BODY, External, Couch, left, L, , magenta, Liver left"
    )
    names = f"{margins}, {parts}, {targets}, {others}".split(", ")
    assert {name: find_organ(name) for name in names} == dict.fromkeys(names)
