"""Fine-tune a semantic segmentation model on a dataset, score it, write its model card and publish it.

accelerate launch run_segmentation.py [--config recipes/X.yaml] [--flag value ...]
"""

import time
from pathlib import Path

from gi_segmentation.errors import exit_on_input_error
from gi_segmentation.memory import keep_freed_memory
from gi_segmentation.processes import (
    leave_printing_to_the_main_process,
    leaving_no_process_behind,
    noticing_lost_processes,
)
from gi_segmentation.shortages import TRAINING


def main(argv: list[str] | None = None) -> None:
    """Run the pipeline from dataset to published checkpoint.

    Args:
        argv: Command-line words without the program's name; None: those of this process.

    Raises:
        InputError: If an argument, the dataset or the model cannot be used, or if the publication fails. The run is
            then complete, and the message has the command that publishes it.
        StoppedError: If SIGTERM, Ctrl-C or `--max_hours` ended the training.
    """
    # The time of the imports and of the preparation counts too.
    started_s = time.monotonic()
    leave_printing_to_the_main_process()
    keep_freed_memory()
    from gi_segmentation.command_line import parse_arguments

    model_args, data_args, run_args = parse_arguments(argv)
    # The stages are imported after the arguments are read. Their packages take seconds to load, and `--help` or a
    # mistake in a flag does not need them.
    from transformers import set_seed

    from gi_segmentation.data.slices import load_slices, select_samples, transform_splits
    from gi_segmentation.labels import find_labels
    from gi_segmentation.models.loading import load_model
    from gi_segmentation.publishing.facts import describe_run, prepare_output_dir
    from gi_segmentation.publishing.hub import prepare_repository
    from gi_segmentation.publishing.options import find_publication_options
    from gi_segmentation.publishing.repository import find_repository
    from gi_segmentation.publishing.results import publish_run, summarize, write_results
    from gi_segmentation.training.trainer import build_trainer, train
    from gi_segmentation.training.training_ranges import find_field_mm, find_training_ranges

    is_main = run_args.process_index == 0
    publishes = run_args.push_to_hub and is_main
    if publishes:
        run_args.hub_model_id = find_repository("--hub_model_id", str(run_args.hub_model_id))
    # With several processes, each of them runs all of these lines. They need the same random weights at the start.
    set_seed(run_args.seed)
    # The main process prepares the slices. The others wait, and find them in the cache.
    with run_args.main_process_first(desc="preparing slices"):
        slices = load_slices(data_args)
    samples = select_samples(slices, data_args, run_args.seed)
    labels = find_labels(slices["train"].features)
    model, processor, kept_labels = load_model(model_args, labels, data_args.image_size, data_args.slice_context)
    facts = describe_run(model, slices, samples, model_args, data_args, run_args, kept_labels)
    train_dataset, eval_dataset = transform_splits(slices, samples, processor, model_args, data_args, run_args.seed)
    # Before the training, this stops a run that would continue from the checkpoints of another model or split, and a
    # second run into the same folder.
    with prepare_output_dir(run_args, facts) as facts:
        # Every checkpoint says which scans it was trained on, so that a prediction can say whether a scan is like
        # them, and can show as large a field.
        model.config.training_ranges = find_training_ranges(slices["train"]).to_config()
        if (field_mm := find_field_mm(slices["train"])) is not None:
            model.config.field_mm = field_mm
        repo_id, options = str(run_args.hub_model_id), find_publication_options(run_args)
        if publishes:
            prepare_repository(repo_id, options.private, overwrite=options.overwrite)
        trainer = build_trainer(model, processor, train_dataset, eval_dataset, data_args, run_args)
        evaluation = train(trainer, started_s)
        # All processes have the same scores. One of them writes the files, and the others wait for it below.
        if is_main:
            results = write_results(trainer, eval_dataset, facts, evaluation)
            print(summarize(run_args, results), flush=True)
        trainer.accelerator.wait_for_everyone()
        trainer.disconnect()
        # The Hub comes last. If it fails, all files are written, and no other process waits.
        if publishes:
            print(publish_run(Path(run_args.output_dir), repo_id, options).describe())


if __name__ == "__main__":
    with leaving_no_process_behind(), exit_on_input_error(TRAINING), noticing_lost_processes():
        main()
