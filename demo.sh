#!/usr/bin/env bash
# The whole pipeline on synthetic data, from a Kaggle folder to a published checkpoint that another process loads.
# `make demo` runs it. All its files are in ./demo. Nothing leaves this machine, because the Hub is a small local one.
set -euo pipefail
cd "$(dirname "$0")"

if [[ "${1:-}" != inside ]]; then
    rm -rf demo
    mkdir demo
    # The local Hub starts this script a second time, with HF_ENDPOINT and HF_TOKEN set, and stops after it. The Hugging
    # Face libraries read these variables when they are imported, so they must be set before. A new HF_HOME keeps the
    # demo apart from the user's own cache.
    export HF_HOME="$PWD/demo/hf_home" TOKENIZERS_PARALLELISM=false
    exec python -m loopback_hub --root demo/hub -- bash demo.sh inside
fi

step() { printf '\n\033[1m== %s\033[0m (%d s)\n' "$1" "$SECONDS"; }

step "Make synthetic patients (a phantom): thirty-six to train and validate, four for a test"
python -m dataset_builder phantom --output_dir demo/kaggle --num_cases 36 --days_per_case 1 --slices_per_scan 16
python -m dataset_builder phantom --output_dir demo/unseen --num_cases 4 --days_per_case 1 --slices_per_scan 16 --seed 1

step "Check the data, build the dataset and publish it"
python -m dataset_builder verify --kaggle_dir demo/kaggle
python -m dataset_builder build --kaggle_dir demo/kaggle --output_dir demo/gi_tract --num_folds 6 --fold 1 \
    --push_to_hub demo/gi_tract

step "Train a small SegFormer from random weights, score it, write its card and publish it"
accelerate launch --config_file accelerate_configs/cpu.yaml run_segmentation.py --config recipes/demo.yaml \
    --dataset_name demo/gi_tract --output_dir demo/run --push_to_hub --hub_model_id demo/segformer-gi-tract

step "Load the model and the dataset by name in a new process, with plain transformers and datasets"
python - <<'PYTHON'
from datasets import load_dataset
from transformers import AutoModelForSemanticSegmentation

model = AutoModelForSemanticSegmentation.from_pretrained("demo/segformer-gi-tract")
dataset = load_dataset("demo/gi_tract")
print(type(model).__name__, model.config.id2label)
print({split: len(dataset[split]) for split in dataset}, "slices")
PYTHON

step "Predict the four test patients and score the submission"
python -m gi_segmentation.predict --model demo/segformer-gi-tract --input demo/unseen/train --output_dir demo/predictions
python -m gi_segmentation.score --truth demo/unseen/train.csv --submission demo/predictions/submission.csv

step "Predict a DICOM series: a segmentation and a structure set for a planning system, and a report"
python -m dataset_builder series --kaggle_dir demo/unseen --output_dir demo/series
python -m gi_segmentation.predict --model demo/segformer-gi-tract --input demo/series --output_dir demo/contours

step "Done"
python - <<'PYTHON'
import json
from pathlib import Path

facts = json.load(open("demo/run/run.json"))
print(f"eval_dice on the validation patients: {facts['scores']['eval_dice']:.4f}")
for name, path in (("card", "README.md"), ("cases", "cases.png"), ("curve", "learning_curve.png")):
    print(f"{name:<8} demo/run/{path}")
print(f"report   {next(Path('demo/contours').glob('*.report.html'))}")
print("Next: train on real data. See README.md, From the Kaggle zip to a published model")
PYTHON
