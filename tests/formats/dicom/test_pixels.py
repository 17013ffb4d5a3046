"""Pixels of DICOM files become the right values in the right frames, or the file is refused before a prediction."""

import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ImplicitVRLittleEndian, JPEGLosslessSV1, RLELossless, generate_uid

from dataset_builder.series import write_series
from gi_segmentation.errors import InputError
from gi_segmentation.formats.dicom.files import count_tiles_in_protocol
from gi_segmentation.formats.dicom.series import find_series
from gi_segmentation.formats.volumes import read_intensities
from tests.support.dicom import edit, item, read_series, set_bytes, strip_preamble, write_enhanced

VOXELS = np.random.default_rng(0).integers(1, 1000, (6, 5, 4)).astype(np.uint16)
AFFINE = np.diag([-1.5, -1.4, 3.0, 1.0])


def find_problem(*paths: Path) -> str:
    """The only problem of files that have no scan."""
    volumes, problems, *_ = find_series(paths)
    assert not volumes and len(problems) == 1
    return next(iter(problems.values()))


class TestPadding:
    @pytest.mark.parametrize(
        ("kind", "stored", "tag_type", "value", "limit"),
        [
            ("<i2", 16, "SS", -32768, None),
            ("<u2", 16, "US", 65535, None),
            ("<u2", 16, "US", 0, None),
            # The value has the type of the other sign.
            ("<i2", 16, "US", 32768, None),
            ("<u2", 16, "SS", -1, None),
            ("<i2", 16, "SS", -2000, -1500),
            ("<i2", 16, "SS", -1500, -2000),
            ("<u2", 16, "US", 60000, 65535),
            # The scanner fills 12 of 16 bits.
            ("<u2", 12, "US", 4095, None),
            ("<i2", 12, "SS", -2048, None),
            ("<i2", 12, "US", 63488, None),
        ],
    )
    @pytest.mark.parametrize("enhanced", [False, True])
    def test_padding_gets_the_lowest_real_value(
        self, kind: str, stored: int, tag_type: str, value: int, limit: int | None, enhanced: bool, tmp_path: Path
    ) -> None:
        real = VOXELS.astype(float) * 2 - 7
        padded = VOXELS.astype(np.int64)
        fill = value if limit is None else (value + limit) // 2
        padded[:2, :, 1:3] = fill
        words = padded.astype(kind).view("<u2")
        if enhanced:
            paths = [write_enhanced(tmp_path / "file", words, AFFINE)]
            real = VOXELS.astype(float) * np.arange(1, 5)
        else:
            paths = write_series(tmp_path, words, AFFINE, slope=2, intercept=-7)
        for path in paths:
            dataset = pydicom.dcmread(path)
            dataset.PixelRepresentation = int(kind == "<i2")
            dataset.BitsStored, dataset.HighBit = stored, stored - 1
            dataset.add_new("PixelPaddingValue", tag_type, value)
            if limit is not None:
                dataset.add_new("PixelPaddingRangeLimit", tag_type, limit)
            dataset.save_as(path)
        volume = read_series(paths)
        voxels = volume.read()  # type: ignore[misc]
        inside = np.ones(VOXELS.shape, dtype=bool)
        inside[:2, :, 1:3] = False
        np.testing.assert_array_equal(voxels[inside], real[inside])
        np.testing.assert_array_equal(voxels[~inside], real[inside].min())
        # The intensities are those of the image. The padding does not stretch them.
        assert read_intensities(volume).max() == pytest.approx(real[inside].max() - min(0, real[inside].min()), abs=20)

    def test_the_type_may_be_unknown(self, tmp_path: Path) -> None:
        padded = VOXELS.astype(np.int16)
        padded[0] = -2000
        for path in write_series(tmp_path, padded.view(np.uint16), AFFINE):
            dataset = pydicom.dcmread(path)
            dataset.PixelRepresentation = 1
            dataset.add_new("PixelPaddingValue", "SS", -2000)
            dataset.save_as(path)
            strip_preamble(path, implicit=True)
        assert read_series(tmp_path.iterdir()).read().min() == VOXELS[1:].min()  # type: ignore[misc]

    def test_an_image_of_padding_alone_is_refused(self, tmp_path: Path) -> None:
        paths = write_series(tmp_path, np.full((6, 5, 4), 9, np.uint16), AFFINE)
        for path in paths:
            dataset = pydicom.dcmread(path)
            dataset.add_new("PixelPaddingValue", "US", 9)
            dataset.save_as(path)
        with pytest.raises(InputError, match="all pixels of this series are padding"):
            read_series(paths).read()  # type: ignore[misc]


class TestScale:
    @pytest.mark.parametrize(
        ("slope", "intercept", "expected"),
        [
            (b"2.5", b"-7", (2.5, -7)),
            # The library passes over a slope alone, and stumbles over an empty one.
            (b"2.5", None, (2.5, 0)),
            (b"", b"", (1, 0)),
            (b"", b"-7", (1, -7)),
            (b"0", b"0", "expected a number above 0 as RescaleSlope, got '0'"),
            (b"-1", b"0", "expected a number above 0 as RescaleSlope, got '-1'"),
            (b"1,0", b"0", "expected a number above 0 as RescaleSlope, got '1,0'"),
            (b"1", b"nan", "expected a number as RescaleIntercept, got 'nan'"),
        ],
    )
    def test_slope_and_intercept(
        self, slope: bytes, intercept: bytes | None, expected: str | tuple[float, float], tmp_path: Path
    ) -> None:
        paths = write_series(tmp_path, VOXELS, AFFINE)
        for path in paths:
            set_bytes(path, RescaleSlope=slope, RescaleIntercept=intercept)
        if isinstance(expected, str):
            assert expected in find_problem(*paths)
        else:
            np.testing.assert_array_equal(read_series(paths).read(), VOXELS.astype(float) * expected[0] + expected[1])

    def test_one_number_as_spacing_is_refused(self, tmp_path: Path) -> None:
        path = write_series(tmp_path, VOXELS, AFFINE)[0]
        set_bytes(path, PixelSpacing=b"1.5")
        assert "has no valid PixelSpacing" in find_problem(path)


class TestFrames:
    def test_a_classic_file_with_several_frames_is_refused(self, tmp_path: Path) -> None:
        (path,) = write_series(tmp_path, VOXELS[:, :, :1], AFFINE)
        edit(path, NumberOfFrames=4, SpacingBetweenSlices=3, PixelData=VOXELS.tobytes())
        assert find_problem(path).startswith(f"{path}: has 4 frames, and does not say where each of them lies")

    @pytest.mark.parametrize("number", [3, 5, None])
    def test_frames_and_their_descriptions_have_one_number(self, number: int | None, tmp_path: Path) -> None:
        path = write_enhanced(tmp_path / "file", VOXELS, AFFINE)
        edit(path, NumberOfFrames=number, PixelData=bytes(60 * (number or 1)))
        assert f"has {number or 1} frames, and describes 4 of them" in find_problem(path)

    def test_a_secondary_capture_is_named(self, tmp_path: Path) -> None:
        (path,) = write_series(tmp_path, VOXELS[:, :, :1], AFFINE)
        edit(path, SOPClassUID="1.2.840.10008.5.1.4.1.1.7.3", NumberOfFrames=4, PixelData=VOXELS.tobytes())
        found = find_series([path])
        assert not found.volumes and not found.problems
        assert found.remarks == [
            f"{path}: passed over: a secondary capture with 4 frames, which do not say where they lie"
        ]

    @pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (3, 1)])
    def test_an_enhanced_series_in_several_files_is_one_scan(self, sizes: tuple[int, ...], tmp_path: Path) -> None:
        first, paths = 0, []
        for number, size in enumerate(sizes):
            chosen = slice(first, first + size)
            affine = AFFINE.copy()
            affine[2, 3] = 3 * first
            paths.append(write_enhanced(tmp_path / str(number), VOXELS[:, :, chosen], affine))
            edit(paths[-1], SeriesInstanceUID="1.2.3", StudyInstanceUID="1.2", FrameOfReferenceUID="1.4")
            edit(paths[-1], ConcatenationUID="1.5", InConcatenationTotalNumber=len(sizes))
            first += size
        volume = read_series(paths[::-1])
        slopes = np.concatenate([np.arange(1, size + 1) for size in sizes])
        np.testing.assert_array_equal(volume.read(), VOXELS * slopes.astype(float))  # type: ignore[misc]
        # The last file is missing.
        assert f"expected {len(sizes)} files of this concatenation, got {len(sizes) - 1}" in find_problem(*paths[:-1])

    def test_measures_and_directions_may_stand_in_each_frame(self, tmp_path: Path) -> None:
        path = write_enhanced(tmp_path / "file", VOXELS, AFFINE)
        dataset = pydicom.dcmread(path)
        (shared,) = dataset.SharedFunctionalGroupsSequence
        for group in dataset.PerFrameFunctionalGroupsSequence:
            group.PlaneOrientationSequence = shared.PlaneOrientationSequence
            group.PixelMeasuresSequence = shared.PixelMeasuresSequence
        dataset.SharedFunctionalGroupsSequence = DicomSequence([item(FrameAnatomySequence=DicomSequence([]))])
        dataset.save_as(path)
        volume = read_series([path])
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-9)
        np.testing.assert_array_equal(volume.read(), VOXELS * np.arange(1.0, 5))  # type: ignore[misc]


def describe_tiles(number: int) -> bytes:
    """The part of a scanner's protocol that counts the tiles of a mosaic; 0: without a value."""
    entry = b"NumberOfImagesInMosaic".ljust(64, b"\0") + struct.pack("<i4siii", 1, b"US\0\0", 10, 1, 77)
    entry = entry[:76] + struct.pack("<ii", int(number > 0), 77)
    return b"SV10" + entry + struct.pack("<4i", 4, 4, 77, 4) + str(number).encode().ljust(4, b"\0")


class TestMosaics:
    @pytest.mark.parametrize("by", ["ImageType", "VFRAME", "private", "protocol"])
    def test_a_mosaic_is_refused(self, by: str, tmp_path: Path) -> None:
        (path,) = write_series(tmp_path, VOXELS[:, :, :1], AFFINE)
        dataset = pydicom.dcmread(path)
        if by in ("ImageType", "VFRAME"):
            dataset.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC" if by == "ImageType" else by]
        elif by == "private":
            dataset.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", 16)
        else:
            block = dataset.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
            block.add_new(0x10, "OB", describe_tiles(16))
        dataset.save_as(path)
        tiles = "several" if by in ("ImageType", "VFRAME") else "16"
        assert f"a mosaic: its image shows {tiles} slices side by side; unpack it with dcm2niix" in find_problem(path)

    def test_an_ordinary_protocol_has_no_tiles(self) -> None:
        assert count_tiles_in_protocol(describe_tiles(0)) == 0
        assert count_tiles_in_protocol(describe_tiles(36)) == 36
        assert [count_tiles_in_protocol(describe_tiles(36)[:length]) for length in (0, 30, 80, 100)] == [0, 0, 0, 0]


class TestStorage:
    def test_bits_at_another_place_are_refused(self, tmp_path: Path) -> None:
        (path,) = write_series(tmp_path, VOXELS[:, :, :1], AFFINE)
        edit(path, BitsStored=12, HighBit=15)
        assert "expected 12 bits of a pixel up to bit 11, got HighBit 15" in find_problem(path)

    def test_bits_that_a_pixel_does_not_use_are_passed_over(self, tmp_path: Path) -> None:
        # Older scanners keep an overlay there.
        paths = write_series(tmp_path, VOXELS | 0x8000, AFFINE)
        for path in paths:
            edit(path, BitsStored=12, HighBit=11)
        np.testing.assert_array_equal(read_series(paths).read(), VOXELS)  # type: ignore[misc]

    def test_the_package_for_a_compression_is_named_as_pip_names_it(self, tmp_path: Path) -> None:
        (path,) = write_series(tmp_path, VOXELS[:, :, :1], AFFINE)
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        dataset.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
        dataset.save_as(path)
        packages = "install with pip python-gdcm>=3.0.10 or pylibjpeg>=2.0 and pylibjpeg-libjpeg>=2.1, or export"
        assert packages in find_problem(path)

    def test_compressed_pixels_that_are_cut_are_found(self, tmp_path: Path) -> None:
        paths = write_series(tmp_path, VOXELS, AFFINE)
        for path in paths:
            dataset = pydicom.dcmread(path)
            dataset.compress(RLELossless)
            dataset.save_as(path)
        np.testing.assert_array_equal(read_series(paths).read(), VOXELS)  # type: ignore[misc]
        paths[1].write_bytes(paths[1].read_bytes()[:-20])
        assert "it ends within its pixels" in find_problem(*paths)

    def test_implicit_types_are_read(self, tmp_path: Path) -> None:
        paths = write_series(tmp_path, VOXELS, AFFINE)
        for path in paths:
            dataset = pydicom.dcmread(path)
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
            dataset.save_as(path, implicit_vr=True, little_endian=True)
        np.testing.assert_array_equal(read_series(paths).read(), VOXELS)  # type: ignore[misc]
        paths[1].write_bytes(paths[1].read_bytes()[:-1])
        assert "59 of 60 bytes are there" in find_problem(*paths)

    def test_a_projection_is_named(self, tmp_path: Path) -> None:
        paths = write_series(tmp_path, VOXELS, AFFINE)
        for path in paths:
            edit(path, ImageType=["DERIVED", "SECONDARY", "PROJECTION IMAGE"], SOPInstanceUID=generate_uid())
        assert "a projection (PROJECTION IMAGE), where organs of several slices overlap" in read_series(paths).note
