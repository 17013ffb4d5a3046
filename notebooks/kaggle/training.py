# %% [markdown]
# # Train a model of stomach and bowels
#
# This notebook trains one model on the competition's slices, with Hugging Face's Trainer on two T4 GPUs. Its input is
# the competition, and the dataset with the packages that `python -m gi_segmentation.kaggle_package` wrote. It needs no
# internet.
#
# A notebook of Kaggle ends after 12 hours. This one stops before, and saves where it is. **To go on, run the notebook
# again with its own last output as an input** (`kaggle kernels push` does both). It ends with a finished model, which
# the submission notebook takes.

# %%
import subprocess
import sys
import time
from pathlib import Path
from shutil import copyfile, copytree

import yaml

# The patients of this fold are held back for the scores. "all" trains on everybody, and then there are no scores.
FOLD = "0"
# Hours after which a training is interrupted, counted from here. Kaggle ends a notebook after 12.
HOURS = 11.5
# T4 GPUs have no bfloat16.
PRECISION = "fp16"
# More flags of run_segmentation.py, for example ["--image_size", "320"].
FLAGS: list[str] = []

STARTED = time.time()
INPUT, WORKING, SCRATCH = Path("/kaggle/input"), Path("/kaggle/working"), Path("/tmp/gi_segmentation")


def find(pattern: str) -> list[Path]:
    """Find files of the inputs. Kaggle has changed the folders above them more than once."""
    return sorted(path for depth in range(5) for path in INPUT.glob("*/" * depth + pattern))


def python(*words: object) -> None:
    """Run a module of Python, and stop this notebook if it fails."""
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


# %% [markdown]
# ## Install
#
# The wheels are in the dataset. What the image has already, such as PyTorch, stays as it is.

# %%
competition = find("uw-madison-gi-tract-image-segmentation")[0]
wheels = find("wheels/gi_segmentation-*.whl")[0].parent
python("pip", "install", "--quiet", "--no-index", "--find-links", wheels, "--requirement", wheels / "requirements.txt")

# %% [markdown]
# ## Build the dataset
#
# The files of the competition become a dataset of Hugging Face, with the folds by patient. It and all caches are in
# `/tmp`, because `/kaggle/working` has 20 GB, and everything in it is kept as the output.

# %%
# %env HF_HOME=/tmp/gi_segmentation/hf_home
if not (SCRATCH / "gi_tract").exists():
    python("dataset_builder", "build", "--kaggle_dir", competition, "--output_dir", SCRATCH / "gi_tract")

# %% [markdown]
# ## Take over the last part
#
# If the output of an earlier version of this notebook is among the inputs, its folders are copied, because a training
# goes on in its own folder, and inputs are read-only. Of two outputs of one fold, that with more steps is taken.


# %%
def steps_done(run: Path) -> int:
    """Return the steps of the last checkpoint beside a run.json."""
    return max((int(folder.name.split("-")[1]) for folder in run.parent.glob("checkpoint-*[0-9]")), default=0)


for run in sorted(find("fold-*/run.json"), key=steps_done, reverse=True):
    if not (WORKING / run.parent.name).exists():
        print("goes on from", run.parent)
        copytree(run.parent, WORKING / run.parent.name, copy_function=copyfile)

# %% [markdown]
# ## Train
#
# All values of the recipe stay as they are. Only the slices of a step are divided among the GPUs.

# %%
import torch

package = wheels.parent
recipe = yaml.safe_load((package / "recipe.yaml").read_text())
gpus = torch.cuda.device_count()
batch, steps = recipe.get("per_device_train_batch_size", 8), recipe.get("gradient_accumulation_steps", 1)
if steps % max(gpus, 1) == 0:
    steps //= max(gpus, 1)
else:
    batch //= gpus
launch = ["--num_machines", 1, "--num_processes", max(gpus, 1), "--dynamo_backend", "no"]
launch += ["--mixed_precision", PRECISION if gpus else "no", *(["--multi_gpu"] if gpus > 1 else [])]

start = []
if (package / "start").exists():
    start = ["--backbone" if "backbone" in recipe else "--model_name_or_path", package / "start"]
run = WORKING / f"fold-{FOLD}"
if (run / "model.safetensors").exists():
    print(run, "is finished")
else:
    python(
        *("accelerate.commands.launch", *launch, "-m", "run_segmentation"),
        *("--config", package / "recipe.yaml", *start, "--dataset_name", SCRATCH / "gi_tract", "--output_dir", run),
        *("--fold", FOLD, "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", steps),
        *("--save_total_limit", 1, "--max_hours", HOURS - (time.time() - STARTED) / 3600, *FLAGS),
    )

# %%
if (run / "part_done.json").exists():
    print("Not finished: run this notebook again, with the output of this version as an input.")
else:
    print("Finished: run the submission notebook. Or train another fold (FOLD above); it averages all that it finds.")
