#!/usr/bin/env bash
# The reference run: from Kaggle's zip to a published model, with scores over all patients.
#
#   reference_runs/gi_tract.sh ZIP NAMESPACE/NAME [FLAGS]
#
# ZIP is the download from Kaggle. NAMESPACE/NAME is the repository to publish to; a new one is private. FLAGS go to
# every training, for example --per_device_train_batch_size 16. Run the same command again after an interruption: what
# is done stays, and the training that was interrupted goes on. docs/cross_validation.md says what the run costs.
#
# Settings from the environment, with their defaults:
#   RECIPE=recipes/upernet-convnext-small.yaml          the recipe of every training
#   CONFIG_FILE=accelerate_configs/single_gpu.yaml      for several GPUs: accelerate_configs/multi_gpu.yaml
#   RUN_DIR=runs/reference                              folder of everything that the run writes
#   NUM_FOLDS=5                                         number of folds, by patient
#   DATASET=                                            a dataset that was built before, then ZIP is not read
set -euo pipefail
cd "$(dirname "$0")/.."
zip=$1 repository=$2 flags=("${@:3}")
recipe=${RECIPE:-recipes/upernet-convnext-small.yaml}
config_file=${CONFIG_FILE:-accelerate_configs/single_gpu.yaml}
run_dir=${RUN_DIR:-runs/reference}
dataset=${DATASET:-$run_dir/gi_tract}

step() { printf '\n== %s\n' "$1"; }

step "Look at the repository, because a refusal must come before the trainings"
python - "$repository" --config "$recipe" "${flags[@]}" <<'PYTHON'
import sys

from gi_segmentation.arguments import parse_arguments
from gi_segmentation.errors import exit_on_input_error
from gi_segmentation.publishing.hub import prepare_repository
from gi_segmentation.publishing.repository import find_repository

with exit_on_input_error():
    _, _, run_args = parse_arguments(sys.argv[2:])
    repo_id = find_repository("NAMESPACE/NAME", sys.argv[1])
    prepare_repository(repo_id, run_args.hub_private_repo, overwrite=run_args.overwrite_repository)
PYTHON

if [[ -z "${DATASET:-}" && ! -d "$dataset" ]]; then
    step "Unpack the zip, and check every slice and annotation"
    if [[ ! -d "$run_dir/kaggle" ]]; then
        # The folder gets its name only when it is whole.
        rm -rf "$run_dir/kaggle.part"
        python -m zipfile -e "$zip" "$run_dir/kaggle.part"
        mv "$run_dir/kaggle.part" "$run_dir/kaggle"
    fi
    python -m dataset_builder verify --kaggle_dir "$run_dir/kaggle"

    step "Build the dataset; each patient belongs to one fold"
    python -m dataset_builder build --kaggle_dir "$run_dir/kaggle" --output_dir "$dataset" \
        --num_folds "${NUM_FOLDS:-5}"
fi

cross_validate() {
    python -m gi_segmentation.cross_validate --config "$recipe" --config_file "$config_file" \
        --output_dir "$run_dir/cv" "$@" -- --dataset_name "$dataset" "${flags[@]}"
}

step "Train on all patients: these are the weights that the main branch will have"
cross_validate --fold all

step "Train each fold, score each patient once, and publish the pooled scores and all models"
cross_validate --push_to_hub "$repository"

step "Load what was published by name, with plain transformers"
python - "$repository" <<'PYTHON'
import sys

from huggingface_hub import list_repo_refs
from transformers import AutoModelForSemanticSegmentation

for branch in list_repo_refs(sys.argv[1]).branches:
    model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1], revision=branch.name)
    print(f"{branch.name}: {type(model).__name__}, {model.num_parameters():,} parameters")
PYTHON
