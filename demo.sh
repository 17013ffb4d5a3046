#!/usr/bin/env bash
# The whole pipeline on synthetic data: from a Kaggle folder to a published checkpoint that a new process loads.
# `make demo` runs it; everything it makes lies in ./demo. Nothing leaves this machine: the Hub is a small local one.
set -euo pipefail
cd "$(dirname "$0")"

if [[ "${1:-}" != inside ]]; then
    rm -rf demo
    mkdir demo
    # The server sets HF_ENDPOINT and HF_TOKEN for the command it runs.
    export HF_HOME="$PWD/demo/hf_home" TOKENIZERS_PARALLELISM=false
    exec python -m tests.support.loopback_hub --root demo/hub -- bash demo.sh inside
fi

step() { printf '\n\033[1m== %s\033[0m (%d s)\n' "$1" "$SECONDS"; }

step "A phantom of the competition's data: thirty-six patients to learn from, four to be tried on"
python -m dataset_builder phantom --output_dir demo/kaggle --num_cases 36 --days_per_case 1 --slices_per_scan 16
python -m dataset_builder phantom --output_dir demo/unseen --num_cases 4 --days_per_case 1 --slices_per_scan 24 --seed 1

step "Check it, build the dataset, publish that"
python -m dataset_builder verify --kaggle_dir demo/kaggle
python -m dataset_builder build --kaggle_dir demo/kaggle --output_dir demo/gi_tract --num_folds 6 --fold 1 \
    --push_to_hub demo/gi_tract

step "Train a small SegFormer from random weights, score it, write its card, publish it"
accelerate launch --config_file accelerate_configs/cpu.yaml run_segmentation.py --config recipes/demo.yaml \
    --dataset_name demo/gi_tract --output_dir demo/run --push_to_hub --hub_model_id demo/segformer-gi-tract

step "A new process loads both by their names, with plain transformers and datasets"
python - <<'PYTHON'
from datasets import load_dataset
from transformers import AutoModelForSemanticSegmentation

model = AutoModelForSemanticSegmentation.from_pretrained("demo/segformer-gi-tract")
dataset = load_dataset("demo/gi_tract")
print(type(model).__name__, model.config.id2label)
print({split: len(dataset[split]) for split in dataset}, "slices")
PYTHON

step "Predict the four unseen patients, score the submission"
python -m gi_segmentation.predict --model demo/segformer-gi-tract --input demo/unseen/train --output_dir demo/predictions
python -m gi_segmentation.score --truth demo/unseen/train.csv --submission demo/predictions/submission.csv

step "Done"
python - <<'PYTHON'
import json

facts = json.load(open("demo/run/run.json"))
print(f"eval_dice on the phantom's unseen patients: {facts['scores']['eval_dice']:.4f}")
for name, path in (("card", "README.md"), ("cases", "cases.png"), ("curve", "learning_curve.png")):
    print(f"{name:<8} demo/run/{path}")
print("Look at a picture of your own data next: README.md, From the Kaggle zip to a published model")
PYTHON
