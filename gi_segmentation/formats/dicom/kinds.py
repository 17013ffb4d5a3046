"""Read what tells apart the images of one place: the echo, the time, the b-value, the kind of contrast and so on."""

from collections.abc import Mapping, Sequence
from typing import Any

# Each name of ours, and where a file has the value: the sequence of an enhanced file, or nothing, and the attribute.
# Images that differ in one of these are no slices of one volume.
KIND_ATTRIBUTES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "SeriesNumber": (("", "SeriesNumber"),),
    "SeriesDescription": (("", "SeriesDescription"),),
    "Modality": (("", "Modality"),),
    "EchoTime": (("MREchoSequence", "EffectiveEchoTime"), ("", "EchoTime")),
    "EchoNumber": (("", "EchoNumbers"),),
    "DiffusionBValue": (("MRDiffusionSequence", "DiffusionBValue"), ("", "DiffusionBValue")),
    "TemporalPosition": (("FrameContentSequence", "TemporalPositionIndex"), ("", "TemporalPositionIdentifier")),
    "ImageType": (
        ("MRImageFrameTypeSequence", "FrameType"),
        ("CTImageFrameTypeSequence", "FrameType"),
        ("", "ImageType"),
    ),
    "ComplexImageComponent": (
        ("MRImageFrameTypeSequence", "ComplexImageComponent"),
        ("", "ComplexImageComponent"),
    ),
    "InversionTime": (("MRModifierSequence", "InversionTimes"), ("", "InversionTime")),
    "FlipAngle": (("MRTimingAndRelatedParametersSequence", "FlipAngle"), ("", "FlipAngle")),
    "SequenceName": (("", "SequenceName"), ("", "PulseSequenceName")),
    "ScanningSequence": (("", "ScanningSequence"),),
    "ScanOptions": (("", "ScanOptions"),),
    "KVP": (("", "KVP"),),
    "ContrastBolusAgent": (("", "ContrastBolusAgent"),),
    "ConvolutionKernel": (("CTReconstructionSequence", "ConvolutionKernel"), ("", "ConvolutionKernel")),
    "StackID": (("FrameContentSequence", "StackID"),),
}
# These may differ from slice to slice of one volume, because slices are acquired one after the other. They tell apart
# what has no other difference, and copies.
TIME_ATTRIBUTES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "GradientDirection": (
        ("MRDiffusionSequence", "DiffusionGradientOrientation"),
        ("", "DiffusionGradientOrientation"),
    ),
    "AcquisitionNumber": (("FrameContentSequence", "FrameAcquisitionNumber"), ("", "AcquisitionNumber")),
    "TriggerTime": (
        ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
        ("", "TriggerTime"),
    ),
    "AcquisitionTime": (
        ("FrameContentSequence", "FrameAcquisitionDateTime"),
        ("", "AcquisitionDateTime"),
        ("", "AcquisitionTime"),
    ),
    "InstanceNumber": (("", "InstanceNumber"),),
    "AcquisitionType": (("", "MRAcquisitionType"),),
    "StudyDate": (("", "StudyDate"),),
    "ConcatenationUID": (("", "ConcatenationUID"),),
    "InConcatenationTotalNumber": (("", "InConcatenationTotalNumber"),),
}
# Where scanners of three makers put the b-value: the group, the block and the element in the block.
PRIVATE_B_VALUES = (
    (0x0019, "SIEMENS MR HEADER", 0x0C),
    (0x0043, "GEMS_PARM_01", 0x39),
    (0x2001, "Philips Imaging DD 001", 0x03),
)
# GE adds this to some b-values.
GE_OFFSET = 1_000_000_000


def read_kind(header: Any, groups: Sequence[Any]) -> dict[str, str]:
    """Return what a frame says about its kind. What it does not say is left out.

    Args:
        header: The header of the file.
        groups: Where an enhanced file may have the values: the functional groups of the frame, and those of all.

    Returns:
        The values by the names of `KIND_ATTRIBUTES` and `TIME_ATTRIBUTES`.
    """
    kind = {}
    for name, places in {**KIND_ATTRIBUTES, **TIME_ATTRIBUTES}.items():
        values = (find_text(header, groups, sequence, attribute) for sequence, attribute in places)
        if value := next(filter(None, values), ""):
            kind[name] = value
    if "DiffusionBValue" not in kind and (value := read_private_b_value(header)):
        kind["DiffusionBValue"] = value
    return kind


def find_text(header: Any, groups: Sequence[Any], sequence: str, attribute: str) -> str:
    """Return a value of the header, or of a sequence in the functional groups; empty if there is none."""
    if not sequence:
        return read_text(header, attribute)
    items = (item for group in groups for item in group.get(sequence) or ())
    return next(filter(None, (read_text(item, attribute) for item in items)), "")


def read_text(item: Any, attribute: Any) -> str:
    """Return the value of an attribute as text without control characters; empty if there is none.

    Numbers are rounded to four digits, because some scanners write 2.3 and 2.3000001 in one series.
    """
    from pydicom.valuerep import PersonName

    try:
        value = item.get(attribute)
        # Attributes that are asked for by their number come with their type.
        value = getattr(value, "value", value)
        value = str(value) if isinstance(value, PersonName) else value
        values = [] if value is None else [value] if isinstance(value, str | bytes | int | float) else list(value)
    # The library decodes a value at its first access. One damaged value must not make the whole file unusable.
    except Exception:
        return "damaged"
    words = (f"{float(f'{one:.4g}'):g}" if isinstance(one, float) else str(one) for one in values)
    # The text is printed to the terminal, where control characters could do harm.
    return "\\".join("".join(filter(str.isprintable, word)).strip() for word in words)


def read_private_b_value(header: Any) -> str:
    """Return the b-value where older scanners write it; empty if there is none."""
    for group, creator, element in PRIVATE_B_VALUES:
        try:
            value = header.private_block(group, creator)[element].value
            first = value if isinstance(value, str | bytes | int | float) else value[0]
            return f"{float(first) % GE_OFFSET:g}"
        # There is no such block, or it has something else.
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            continue
    return ""
