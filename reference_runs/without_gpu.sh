#!/usr/bin/env bash
# The reference run for a machine without a GPU: train on a few real patients, and score each of them once.
#
#   reference_runs/without_gpu.sh KAGGLE_DIR [KAGGLE_DIR ...] [-- FLAGS]
#
# Each KAGGLE_DIR is a folder in Kaggle's layout, with other patients than the others. FLAGS go to every training, for
# example --seed 1. The script needs the extra `timm`. Run the same command again after an interruption: it goes on
# where it stopped.
#
# It trains a model on all patients and one for each fold, JOBS at a time, each with one core. The models of the folds
# score the patients that they never saw, and the post-processing is learnt from these predictions. The model of all
# patients, with this post-processing if it helps, is the one to predict with. No checkpoint is chosen by its scores.
#
# Settings from the environment, with their defaults:
#   RUN_DIR=runs/without_gpu        folder of everything that the run writes
#   NUM_FOLDS=5                     number of folds, by patient
#   JOBS=2                          trainings side by side
set -euo pipefail
cd "$(dirname "$0")/.."
kaggle_dirs=()
while (($#)) && [[ "$1" != -- ]]; do
    kaggle_dirs+=("$1")
    shift
done
flags=("${@:2}")
((${#kaggle_dirs[@]})) || { echo "usage: $0 KAGGLE_DIR [KAGGLE_DIR ...] [-- FLAGS]" >&2; exit 2; }
run_dir=${RUN_DIR:-runs/without_gpu}
folds=${NUM_FOLDS:-5}
encoder=backbones/efficientnet-lite0

if [[ ! -d "$encoder" && " ${flags[*]} " != *" --backbone "* ]]; then
    python -m gi_segmentation.models.efficientnet --output_dir "$encoder"
fi
[[ -d "$run_dir/gi_tract" ]] || python -m dataset_builder build --kaggle_dir "${kaggle_dirs[@]}" \
    --output_dir "$run_dir/gi_tract" --num_folds "$folds"

cross_validate() {
    "$@" python -m gi_segmentation.cross_validate --config recipes/upernet-efficientnet-lite0.yaml \
        --config_file accelerate_configs/cpu.yaml --output_dir "$run_dir/cv" "${how[@]}" \
        -- --dataset_name "$run_dir/gi_tract" "${flags[@]}"
}

# Several trainings with one thread each are faster than one training with several threads.
export OMP_NUM_THREADS=1
how=(--fold %fold%)
{ echo all; seq 0 $((folds - 1)); } | cross_validate xargs -P "${JOBS:-2}" -I %fold%
how=(--collect --postprocessing)
cross_validate env

echo "predict with: python -m gi_segmentation.predict --model $run_dir/cv --input ... --output_dir ..."
