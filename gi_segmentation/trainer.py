"""The Trainer of this task: loss at input resolution, scores at native resolution, the right checkpoint at the end."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    SegformerImageProcessorPil,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import sort_checkpoints

from gi_segmentation.arguments import RunArguments
from gi_segmentation.data import SliceTransform, collate
from gi_segmentation.errors import InputError
from gi_segmentation.evaluation import ComputeMetrics, count_batch
from gi_segmentation.losses import dice_cross_entropy_loss
from gi_segmentation.publish import hub_errors

logger = logging.getLogger(__name__)


class EpochCallback(TrainerCallback):
    """Tells the training transform which epoch it is, so that every epoch augments differently."""

    def __init__(self, transform: SliceTransform) -> None:
        self.transform = transform

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch before its first slice is read."""
        self.transform.epoch.fill_(int(state.epoch or 0))


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Load a checkpoint into a model, every tensor of it.

    `Trainer` would load the file's keys as they are and skip those it does not know. Checkpoints of some families
    carry older names, so that most weights would silently stay as they were (transformers 5.23: 116 of 124 tensors
    of a SegFormer). `from_pretrained` knows the older names.
    """
    loaded = type(model).from_pretrained(checkpoint, config=model.config)
    model.load_state_dict(loaded.state_dict(), strict=True)


def find_checkpoint(output_dir: Path) -> Path | None:
    """The last checkpoint that was saved whole; later ones that were cut off are removed.

    `trainer_state.json` is the last file a checkpoint gets.
    """
    for checkpoint in map(Path, reversed(sort_checkpoints(str(output_dir)))):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s was not saved whole; going back to the one before", checkpoint)
            shutil.rmtree(checkpoint, ignore_errors=True)
        else:
            return checkpoint
    return None


class SegmentationTrainer(Trainer):
    """`Trainer` for semantic segmentation of slices of many sizes."""

    loss_is_scaled_for_ga = False  # our loss is the mean of one batch

    args: RunArguments
    model: PreTrainedModel

    def get_train_dataloader(self) -> DataLoader:
        """The training batches, without a last one of a single slice.

        Batch normalisation of a map pooled to one pixel (UPerNet, BEiT) has no variance over a single slice and
        raises. Other slices are left out in other epochs.
        """
        num_slices = len(cast(Dataset, self.train_dataset))
        self.args.dataloader_drop_last = num_slices > 1 and num_slices % self._train_batch_size == 1
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = False  # the validation batches keep every slice

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Dice plus cross-entropy on the logits brought to input resolution."""
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = dice_cross_entropy_loss(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Loss, and in place of logits the few counts per slice from which the scores follow."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), count_batch(outputs.logits.detach(), inputs), inputs["scan"]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """The scheduler asked for, or the one drop of `--lr_drop_at`."""
        if self.args.lr_drop_at is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            drop_step = self.args.lr_drop_at * num_training_steps
            assert self.optimizer is not None  # made before; only the type checker doubts it
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: 1.0 if step < drop_step else 0.1)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_weights(self.model, Path(self.state.best_model_checkpoint or ""))


def build_trainer(
    model: PreTrainedModel,
    processor: SegformerImageProcessorPil,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    run_args: RunArguments,
) -> SegmentationTrainer:
    """Put model, data, loss and scores together.

    Args:
        model: From `modeling.load_model`.
        processor: Saved with every checkpoint.
        train_dataset: With a `SliceTransform` attached.
        eval_dataset: With a scoring `SliceTransform` attached.
        run_args: How to train.

    Raises:
        InputError: If the run is to be published and the Hub refuses that.
    """
    callbacks: list[TrainerCallback] = [EpochCallback(train_dataset.format["format_kwargs"]["transform"])]
    if run_args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=run_args.early_stopping_patience))
    # With --push_to_hub the Trainer makes the repository at once: a wrong token is better known before than after.
    with hub_errors(str(run_args.hub_model_id)):
        return SegmentationTrainer(
            model=model,
            args=run_args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            compute_metrics=ComputeMetrics(),
            callbacks=callbacks,
        )


def train(trainer: SegmentationTrainer) -> dict[str, float]:
    """Train to the end, going on where an earlier run of the same command stopped; then score the best checkpoint.

    Returns:
        The scores, `eval_*`, of the weights that the trainer's model holds afterwards.

    Raises:
        InputError: If no checkpoint was scored.
    """
    checkpoint = find_checkpoint(Path(trainer.args.output_dir))
    if checkpoint is not None:
        logger.warning("Resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.best_model_checkpoint is None:
        raise InputError("no checkpoint was scored: train for at least one evaluation (--eval_strategy, --eval_steps)")
    return trainer.evaluate()
