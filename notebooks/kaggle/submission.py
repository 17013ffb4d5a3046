# %% [markdown]
# # Predict the hidden test set
#
# This notebook writes `submission.csv` with an ensemble of checkpoints and flipped slices. It needs no internet. Its
# inputs are the competition, and checkpoints: those in the dataset that `python -m gi_segmentation.kaggle_package`
# wrote, and those in the outputs of training notebooks.
#
# When you save it, `test/` is empty, and the file has a header only. When you submit it, Kaggle runs it once more with
# the hidden scans, within 9 hours.

# %%
import subprocess
import sys
from pathlib import Path
from shutil import copyfile

# Averages over flipped slices: four times the work, for a little more score.
FLIPS = True
# More flags of gi_segmentation.predict, for example ["--no_postprocessing"].
FLAGS: list[str] = []

INPUT, WORKING, SCRATCH = Path("/kaggle/input"), Path("/kaggle/working"), Path("/tmp/gi_segmentation")


def find(pattern: str) -> list[Path]:
    """Find files of the inputs. Kaggle has changed the folders above them more than once."""
    return sorted(path for depth in range(5) for path in INPUT.glob("*/" * depth + pattern))


def python(*words: object) -> None:
    """Run a module of Python, and stop this notebook if it fails."""
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


# %% [markdown]
# ## Install

# %%
competition = find("uw-madison-gi-tract-image-segmentation")[0]
wheels = find("wheels/gi_segmentation-*.whl")[0].parent
python("pip", "install", "--quiet", "--no-index", "--find-links", wheels, "--requirement", wheels / "requirements.txt")

# %% [markdown]
# ## Predict
#
# The first lines say how long it will take. A slice that cannot be read gets an empty prediction and a warning,
# because nobody can repair the hidden test set, and Kaggle refuses a file without its rows.

# %%
# %env HF_HUB_OFFLINE=1
import torch

models = [path.parent for path in [*find("models/*/model*.safetensors"), *find("fold-*/model*.safetensors")]]
if not models:
    raise FileNotFoundError("No checkpoint among the inputs: add the output of a training that is finished.")
print("checkpoints:", *models, sep="\n")
gpus = torch.cuda.device_count()
launch = ["--num_machines", 1, "--num_processes", max(gpus, 1), "--dynamo_backend", "no", "--mixed_precision", "no"]
python(
    *("accelerate.commands.launch", *launch, *(["--multi_gpu"] if gpus > 1 else []), "-m", "gi_segmentation.predict"),
    *("--model", *dict.fromkeys(models), "--precision", "auto", *(["--test_time_flips"] if FLIPS else [])),
    *("--input", competition / "test", "--sample_submission", competition / "sample_submission.csv"),
    *("--on_error", "empty", "--format", "kaggle", "--output_dir", SCRATCH / "prediction", *FLAGS),
)

# %%
copyfile(SCRATCH / "prediction" / "submission.csv", WORKING / "submission.csv")
print(*(WORKING / "submission.csv").read_text().splitlines()[:7], sep="\n")
