#!/usr/bin/env bash
# The reference run for a machine without a GPU: train on a few real scans, each patient held back once.
#
#   reference_runs/without_gpu.sh KAGGLE_DIR [FLAGS]
#
# KAGGLE_DIR is a folder in Kaggle's layout with a few patients. FLAGS go to every training, for example --seed 1. The
# script needs the extra `timm`. Run the same command again after an interruption: it goes on where it stopped.
#
# Settings from the environment, with their defaults:
#   RUN_DIR=runs/without_gpu        folder of everything that the run writes
#   NUM_FOLDS=6                     number of folds; with as many folds as patients, each fold holds one patient back
set -euo pipefail
cd "$(dirname "$0")/.."
kaggle_dir=$1 flags=("${@:2}")
run_dir=${RUN_DIR:-runs/without_gpu}
encoder=backbones/efficientnet-lite0

[[ -d "$encoder" ]] || python -m gi_segmentation.models.efficientnet --output_dir "$encoder"
[[ -d "$run_dir/gi_tract" ]] || python -m dataset_builder build --kaggle_dir "$kaggle_dir" \
    --output_dir "$run_dir/gi_tract" --num_folds "${NUM_FOLDS:-6}"
python -m gi_segmentation.cross_validate --config recipes/upernet-efficientnet-lite0.yaml \
    --config_file accelerate_configs/cpu.yaml --output_dir "$run_dir/cv" --postprocessing \
    -- --dataset_name "$run_dir/gi_tract" "${flags[@]}"
