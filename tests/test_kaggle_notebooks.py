"""The notebooks for Kaggle run as they are, on a machine like that of Kaggle: a killed training, two submissions.

It needs root for the namespaces, a package index, and minutes.
"""

import csv
import re
import shutil
from pathlib import Path

import pytest
import torch

from dataset_builder.phantom import write_phantom
from gi_segmentation.kaggle_package import main
from gi_segmentation.publishing.kaggle import IMAGE_PACKAGES
from tests.support.fake_kaggle import FakeKaggle, can_make_one, make_image, printed
from tests.support.models import write_base
from tests.support.processes import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not can_make_one(), reason="only root can mount /kaggle and take the network away"),
]
TRAINING = "someone/gi-tract-segmentation-training"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kaggle")


@pytest.fixture(scope="module")
def freeze(scratch: Path) -> Path:
    """The packages of Kaggle's image, with this machine's PyTorch."""
    text = re.sub(r"^torch==.*$", f"torch=={torch.__version__.split('+')[0]}", IMAGE_PACKAGES.read_text(), flags=re.M)
    path = scratch / "freeze.txt"
    path.write_text(re.sub(r"^torchvision==.*\n", "", text, flags=re.M))
    return path


@pytest.fixture(scope="module")
def package(scratch: Path, freeze: Path) -> Path:
    base = write_base(scratch / "base", "segformer")
    recipe = (ROOT / "recipes" / "segformer-b0.yaml").read_text()
    for key, value in {"model_name_or_path": base, "image_size": 64, "per_device_train_batch_size": 4}.items():
        recipe = re.sub(rf"^{key}: \S+", f"{key}: {value}", recipe, flags=re.M)
    (scratch / "recipe.yaml").write_text(recipe.replace("num_train_epochs: 12", "num_train_epochs: 4"))
    words = ["--user", "someone", "--recipe", str(scratch / "recipe.yaml"), "--python_version", "3.11"]
    main([*words, "--image_packages", str(freeze), "--output_dir", str(scratch / "package")])
    return scratch / "package"


def read_rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_a_training_is_killed_goes_on_and_its_model_is_submitted(scratch: Path, freeze: Path, package: Path) -> None:
    phantom, training, submission = scratch / "phantom", *(package / kind for kind in ("training", "submission"))
    write_phantom(phantom, num_cases=5, days_per_case=1, slices_per_scan=8, num_proc=1)
    fake = FakeKaggle(scratch / "fake", make_image(scratch / "image", freeze))
    competition = fake.mount_competition(phantom)
    fake.mount("datasets", "someone/gi-tract-segmentation-training-files", package / "dataset")

    run = fake.working / "fold-0"
    fake.kill(training / "training.ipynb", lambda: any(run.glob("checkpoint-*/checksums.json")))
    assert not (run / "model.safetensors").exists()
    fake.mount("notebooks", TRAINING, fake.working)
    said = printed(fake.run(training / "training.ipynb"))
    assert "goes on from" in said and "Finished: run the submission notebook" in said
    assert (run / "model.safetensors").is_file() and (run / "run.json").is_file()
    fake.mount("notebooks", TRAINING, fake.working)

    # What a competitor sees: `test` is missing, and the sample has a header only.
    (competition / "sample_submission.csv").write_text("id,class,predicted\n")
    fake.run(submission / "submission.ipynb")
    assert read_rows(fake.working / "submission.csv") == [["id", "class", "predicted"]]

    # What Kaggle puts there: other scans, with one slice that is cut off.
    hidden = scratch / "hidden"
    write_phantom(hidden, num_cases=2, days_per_case=1, slices_per_scan=8, num_proc=1, seed=9)
    shutil.copytree(hidden / "train", competition / "test")
    rows = [row[:2] for row in read_rows(hidden / "train.csv")[1:]][::-1]
    text = "".join(f"{','.join(row)},\n" for row in rows)
    (competition / "sample_submission.csv").write_text("id,class,predicted\n" + text)
    cut = sorted((competition / "test").rglob("slice_0003_*.png"))[0]
    cut.write_bytes(cut.read_bytes()[:40])
    said = printed(fake.run(submission / "submission.ipynb"))
    assert cut.name in said
    header, *written = read_rows(fake.working / "submission.csv")
    assert header == ["id", "class", "predicted"] and [row[:2] for row in written] == rows
    case_day = cut.parents[1].name
    assert not any(row[2] for row in written if row[0] == f"{case_day}_slice_0003")
    assert any(row[2] for row in written)
    # Nothing else is in the output.
    assert [path.name for path in fake.working.iterdir()] == ["submission.csv"]
