"""Many scans: one that cannot be read stops no other one, and an interrupted prediction goes on where it stopped."""

import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from dataset_builder.series import KAGGLE_AXES
from gi_segmentation.errors import InputError
from gi_segmentation.formats.inputs import InputScan, find_scans
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.batches import PredictionSettings
from gi_segmentation.inference.members import Member, load_members
from gi_segmentation.inference.output_folder import write_submission
from gi_segmentation.inference.outputs import output_paths
from gi_segmentation.inference.prediction import ScanOutcome, predict_files
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.predict import main
from tests.support.models import save_model
from tests.support.processes import ROOT, RunPython, hold
from tests.support.volumes import prediction_words

CONFIG = str(ROOT / "accelerate_configs" / "multi_cpu.yaml")
SPACING = (9.0, 9.0, 3.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "segformer", seed=0)


@pytest.fixture(scope="module")
def members(model: Path) -> list[Member]:
    return load_members([str(model)], None, Computation("cpu"))


def write_nifti(path: Path, seed: int = 0, shape: tuple[int, ...] = (40, 36, 3)) -> Path:
    affine = np.eye(4)
    affine[:3, :3] = KAGGLE_AXES * SPACING
    path.parent.mkdir(parents=True, exist_ok=True)
    # Smooth, so that the model sees more than noise of one mean.
    voxels = 300 * np.exp(gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3) * 20)
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.uint16), affine), path)
    return path


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*"))


def run(
    members: list[Member],
    scans: list[InputScan],
    output_dir: Path,
    formats: tuple[str, ...] = ("nifti",),
    **settings: int,
) -> list[ScanOutcome]:
    return list(
        predict_files(members, scans, formats, output_dir, PredictionSettings(**{"num_workers": 0, **settings}))
    )


class TestFailures:
    def test_a_name_that_is_no_utf8_is_a_name(self, members: list[Member], tmp_path: Path) -> None:
        good, other = write_nifti(tmp_path / "in" / "a.nii"), os.fsdecode(b"caf\xe9")
        # nibabel writes to such a name too, but a copy surely has it.
        shutil.copy(good, good.with_name(f"{other}.nii"))
        results = run(members, find_scans(good.parent).scans, tmp_path / "out", ("nifti", "report"))
        assert [(one.name, one.status) for one in results] == [("a", "done"), (other, "done")]
        report = (tmp_path / "out" / f"{other}.report.json").read_text(encoding="utf-8")
        assert json.loads(report)["scan"] == other
        assert r"caf\udce9" in (tmp_path / "out" / f"{other}.report.html").read_text(encoding="utf-8")

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_bad_scans_get_a_message_each_and_the_others_are_done(
        self, num_workers: int, members: list[Member], tmp_path: Path
    ) -> None:
        folder = tmp_path / "in"
        good = [write_nifti(folder / f"{name}.nii", seed) for seed, name in enumerate(["a", "c", "e", "z"])]
        affine = nibabel.load(good[0]).affine
        (folder / "b.nii.gz").write_bytes(b"garbage")
        whole = write_nifti(folder / "d.nii.gz")
        whole.write_bytes(whole.read_bytes()[:2000])
        for name, voxels in (
            ("nan", np.full((8, 8, 3), np.nan, np.float32)),
            ("same", np.full((8, 8, 3), 7, np.int16)),
            ("time", np.zeros((8, 8, 3, 2), np.int16)),
        ):
            nibabel.save(nibabel.Nifti1Image(voxels, affine), folder / f"{name}.nii.gz")
        (folder / "link.nii").symlink_to(folder / "gone.nii")
        (folder / "loop").symlink_to(folder)
        (folder / "._a.nii").write_bytes(b"what a Mac adds to a zip")
        results = run(members, find_scans(folder).scans, tmp_path / "out", num_workers=num_workers, batch_size=2)
        messages = {result.name: result.message for result in results if result.status == "failed"}
        expected = {
            "b": "not a whole NIfTI file",
            "d": "its voxels cannot be read",
            "nan": "has no finite intensity",
            "same": "has the same intensity everywhere",
            "time": "expected one volume of real numbers",
            "link": "not a whole NIfTI file",
        }
        assert messages.keys() == expected.keys() and len(results) == 10
        for name, text in expected.items():
            assert text in messages[name] and str(folder / name) in messages[name] and "\n" not in messages[name]
        assert visible(tmp_path / "out") == ["a.nii.gz", "c.nii.gz", "e.nii.gz", "z.nii.gz"]
        # A bad scan changes no other one.
        alone = find_scans(folder / "e.nii").scans
        (result,) = run(members, alone, tmp_path / "alone")
        assert result.files[0].read_bytes() == (tmp_path / "out" / "e.nii.gz").read_bytes()

    def test_the_command_prints_a_table_and_ends_with_an_error(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_nifti(tmp_path / "in" / "a.nii")
        (tmp_path / "in" / "b.nii").write_bytes(b"garbage")
        bad = re.escape(f"b ({tmp_path / 'in' / 'b.nii'}: not a whole NIfTI file")
        with pytest.raises(InputError, match=f"1 of 2 scans failed: {bad}"):
            main(prediction_words(model, tmp_path / "in", tmp_path / "out", "--format", "nifti"))
        printed = capsys.readouterr()
        assert "b failed: " in printed.err
        header, first, second = printed.out.splitlines()[-3:]
        assert header == "scan | slices | seconds | status | files"
        assert re.fullmatch(r"a    \|      3 \| +\d+\.\d \| done   \| a\.nii\.gz", first)
        assert re.fullmatch(r"b    \|      0 \| +0\.0 \| failed \|", second)

    def test_a_submission_needs_all_scans(self, model: Path, kaggle_copy: Path, tmp_path: Path) -> None:
        words = prediction_words(model, kaggle_copy / "train", tmp_path / "out")
        broken = sorted(kaggle_copy.rglob("slice_0002*.png"))[-1]
        whole = broken.read_bytes()
        broken.write_bytes(whole[:200])
        scan = broken.parent.parent.name
        with pytest.raises(InputError, match=rf"1 of 2 scans failed: {scan} .*submission\.csv needs all scans"):
            main(words)
        assert visible(tmp_path / "out") == []
        # After the repair, only this scan is predicted, and the file is the same as from one run.
        broken.write_bytes(whole)
        (path,) = main(words)
        assert [one.name for one in path.parent.iterdir()] == ["submission.csv"]
        (other,) = main(prediction_words(model, kaggle_copy / "train", tmp_path / "other"))
        assert path.read_bytes() == other.read_bytes()

    def test_a_slice_with_a_wrong_name_stops_only_its_scan(self, kaggle_copy: Path) -> None:
        path = sorted(kaggle_copy.rglob("slice_0002*.png"))[0]
        path.rename(path.with_name("slice_2.png"))
        first, second = find_scans(kaggle_copy).scans
        assert "slice_2.png: expected caseN_dayN/scans" in first.problem and not second.problem


class TestContinuing:
    def test_what_is_done_is_skipped(self, members: list[Member], tmp_path: Path) -> None:
        for seed, name in enumerate("abc"):
            write_nifti(tmp_path / "in" / f"{name}.nii", seed)
        scans = find_scans(tmp_path / "in").scans
        going = predict_files(members, scans, ["nifti"], tmp_path / "out", PredictionSettings(num_workers=0))
        first = next(going)
        # The files of a scan are there as soon as it is done, and the run stops here.
        assert first.status == "done" and visible(tmp_path / "out") == ["a.nii.gz"]
        going.close()
        # What a killed process leaves of a scan that it was writing.
        leftover = tmp_path / "out" / ".predictions" / ".b.json.partial" / "b.report.json"
        leftover.parent.mkdir()
        leftover.write_text("{")
        before = (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns
        results = run(members, scans, tmp_path / "out")
        assert [(one.name, one.status) for one in results] == [("a", "skipped"), ("b", "done"), ("c", "done")]
        assert (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns == before
        run(members, scans, tmp_path / "once")
        for name in visible(tmp_path / "once"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
        # A file that was removed is made again, and so is a format that was not there.
        (tmp_path / "out" / "b.nii.gz").unlink()
        formats = ("nifti", *(f"probability-{organ}" for organ in GI_TRACT.names))
        assert {one.status for one in run(members, scans[:1], tmp_path / "out", formats)} == {"done"}
        assert [one.status for one in run(members, scans, tmp_path / "out")] == ["skipped", "skipped", "done"]

    def test_a_prediction_that_was_killed_after_its_submission_was_written_is_completed(
        self, model: Path, members: list[Member], small_kaggle_dir: Path, tmp_path: Path
    ) -> None:
        scans = find_scans(small_kaggle_dir / "train").scans
        words = prediction_words(model, small_kaggle_dir / "train", tmp_path / "out")
        run(members, scans, tmp_path / "out", ("kaggle",))
        # It is killed here: the file is there, and so are the rows of one scan.
        expected = write_submission(scans, tmp_path / "out").read_bytes()
        (tmp_path / "out" / output_paths("kaggle", scans[0])[0]).unlink()
        (path,) = main(words)
        assert path.read_bytes() == expected
        assert [one.name for one in path.parent.iterdir()] == ["submission.csv"]
        with pytest.raises(InputError, match=r"submission\.csv: exists"):
            main(words)
        # A file of somebody else stays.
        run(members, scans, tmp_path / "out", ("kaggle",))
        path.write_text("precious")
        with pytest.raises(InputError, match=r"submission\.csv: exists"):
            main(words)
        assert path.read_text() == "precious"

    def test_a_second_prediction_into_the_same_folder_ends_before_it_changes_anything(
        self, model: Path, tmp_path: Path
    ) -> None:
        write_nifti(tmp_path / "in" / "a.nii")
        words = prediction_words(model, tmp_path / "in", tmp_path / "out", "--format", "nifti")
        with hold(tmp_path / "out" / ".lock") as pid:
            with pytest.raises(InputError, match=rf"out: process {pid} on \S+ writes to this folder"):
                main(words)
            assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
        main(words)
        assert visible(tmp_path / "out") == ["a.nii.gz"] and not (tmp_path / "out" / ".lock").exists()

    def test_other_settings_are_refused(self, members: list[Member], tmp_path: Path) -> None:
        write_nifti(tmp_path / "in" / "a.nii")
        scans = find_scans(tmp_path / "in").scans
        run(members, scans, tmp_path / "out")
        before = (tmp_path / "out" / "a.nii.gz").read_bytes()
        with pytest.raises(
            InputError, match=r"has predictions of a with other settings: test_time_flips was False and"
        ):
            run(members, scans, tmp_path / "out", flips=True)
        other = load_members([str(save_model(tmp_path / "other", "segformer", seed=1))], None, Computation("cpu"))
        with pytest.raises(
            InputError, match=r"other settings: checkpoints was \['sha256 .* is now \['sha256 .*name an"
        ):
            run(other, scans, tmp_path / "out")
        # How the slices are batched, and from where the model is loaded, does not matter.
        moved = shutil.copytree(members[0].name, tmp_path / "moved")
        again = load_members([str(moved)], None, Computation("cpu"))
        assert run(again, scans, tmp_path / "out", batch_size=3)[0].status == "skipped"
        assert (tmp_path / "out" / "a.nii.gz").read_bytes() == before

    def test_another_scan_with_the_same_name_is_not_taken_for_done(
        self, members: list[Member], tmp_path: Path
    ) -> None:
        for seed, patient in enumerate(["first", "second"]):
            write_nifti(tmp_path / patient / "image.nii", seed)
        run(members, find_scans(tmp_path / "first").scans, tmp_path / "out")
        (result,) = run(members, find_scans(tmp_path / "second").scans, tmp_path / "out")
        assert result.status == "failed" and "has predictions of another scan with the name image" in result.message

    def test_a_file_of_somebody_else_is_not_overwritten(self, members: list[Member], tmp_path: Path) -> None:
        write_nifti(tmp_path / "in" / "a.nii")
        (tmp_path / "a.nii.gz").write_text("precious")
        (result,) = run(members, find_scans(tmp_path / "in").scans, tmp_path)
        assert "a.nii.gz: exists; remove it or name another --output_dir" in result.message
        assert (tmp_path / "a.nii.gz").read_text() == "precious"

    def test_an_output_folder_in_the_input_is_passed_over(self, model: Path, tmp_path: Path) -> None:
        write_nifti(tmp_path / "a.nii")
        words = prediction_words(model, tmp_path, tmp_path / "out", "--format", "nifti")
        assert main(words) == main(words) == [tmp_path / "out" / "a.nii.gz"]

    def test_a_scan_that_cannot_be_written_leaves_nothing(
        self, members: list[Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_nifti(tmp_path / "in" / "a.nii")
        formats = ("nifti", *(f"probability-{organ}" for organ in GI_TRACT.names))

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("gi_segmentation.inference.outputs.write_probabilities", full)
        with pytest.raises(InputError, match=r"out: cannot be written \(\[Errno 28\] No space left"):
            run(members, find_scans(tmp_path / "in").scans, tmp_path / "out", formats)
        assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))


def test_two_processes_share_the_scans(model: Path, kaggle_dir: Path, tmp_path: Path, run_python: RunPython) -> None:
    words = ["--model", str(model), "--input", str(kaggle_dir / "train"), "--num_workers", "0"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", CONFIG, "-m", "gi_segmentation.predict"]
    formats = ["--format", "kaggle", "nifti", "--output_dir"]
    done = run_python([*launch, *words, *formats, str(tmp_path / "two")], cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    # One table, in the order of the scans.
    rows = [line.split(" | ") for line in done.stdout.splitlines() if " | " in line]
    assert [row[0].strip() for row in rows] == [
        "scan",
        *(scan.name for scan in find_scans(kaggle_dir / "train").scans),
    ]
    assert {row[3].strip() for row in rows[1:]} == {"done"}
    main([*words, "--device", "cpu", *formats, str(tmp_path / "one")])
    assert visible(tmp_path / "one") == visible(tmp_path / "two")
    for name in visible(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_memory_does_not_grow_with_the_number_of_scans(members: list[Member], tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii", shape=(60, 60, 60))
    (scan,) = find_scans(tmp_path / "a.nii").scans
    peaks = {}
    for number in (2, 20):
        scans = []
        for index in range(number):
            copy = tmp_path / f"{number}" / f"s{index:02d}.nii"
            copy.parent.mkdir(exist_ok=True)
            copy.symlink_to(tmp_path / "a.nii")
            scans += find_scans(copy).scans
        # It counts what NumPy and Python allocate: intensities, masks and files.
        tracemalloc.start()
        run(members, scans, tmp_path / f"out{number}", batch_size=8)
        peaks[number] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    masks = len(GI_TRACT.names) * np.prod(scan.volume.shape)
    # To keep the masks of all scans would take 18 times as much. A few times may come from what is read ahead.
    assert peaks[20] < peaks[2] + 6 * masks


def test_probabilities_lie_on_the_grid_of_the_input(model: Path, tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "in" / "a.nii", shape=(60, 50, 4))
    original = nibabel.load(source)
    nibabel.save(original.slicer[:, :, :3], source)
    words = prediction_words(model, source, tmp_path / "out", "--probabilities", "--format", "nifti")
    written = main(words)
    assert [path.name for path in written] == [
        "a.nii.gz",
        *(f"a.{organ}.probability.nii.gz" for organ in GI_TRACT.names),
    ]
    labels = np.asarray(nibabel.load(written[0]).dataobj)
    images = [nibabel.load(path) for path in written[1:]]
    for image in images:
        assert image.shape == labels.shape and image.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(image.affine, original.affine)
    values = np.stack([image.get_fdata() for image in images])
    assert 0 < values.min() < 0.24 and 0.26 < values.max() < 1 and len(np.unique(labels)) > 2
    # The organ of a voxel is the most probable one, and the background has the rest.
    background = 1 - values.sum(axis=0)
    inside = labels > 0
    chosen = np.take_along_axis(values, np.maximum(labels.astype(int) - 1, 0)[None], axis=0)[0]
    assert np.all((chosen >= values.max(axis=0) - 0.004)[inside])
    assert np.all((values.max(axis=0) <= background + 0.01)[~inside])
    # They do not change the label map, and need NIfTI.
    (plain,) = main(prediction_words(model, source, tmp_path / "plain", "--format", "nifti"))
    assert plain.read_bytes() == written[0].read_bytes()


def test_probabilities_of_an_ensemble_are_their_mean(tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "a.nii")
    models = [save_model(tmp_path / str(seed), "segformer", seed) for seed in (0, 1)]
    values = []
    for number, names in enumerate([models[:1], models[1:], models]):
        words = prediction_words(names[0], source, tmp_path / f"out{number}", "--probabilities", "--format", "nifti")
        words[1:2] = map(str, names)
        _, *files = main(words)
        values.append(np.stack([nibabel.load(file).get_fdata() for file in files]))
    np.testing.assert_allclose(values[2], (values[0] + values[1]) / 2, atol=0.005)
    assert np.abs(values[0] - values[1]).max() > 0.02


def test_probabilities_need_nifti(model: Path, kaggle_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--probabilities: are NIfTI files; add nifti to --format, which is kaggle"):
        main(prediction_words(model, kaggle_dir, tmp_path, "--probabilities"))
