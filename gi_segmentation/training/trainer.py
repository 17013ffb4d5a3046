"""The Trainer of this task: loss at input resolution, scores at native resolution, the right checkpoint at the end."""

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, RandomSampler, Sampler
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

from gi_segmentation.arguments import DataArguments, RunArguments
from gi_segmentation.data.preprocessing import SliceTransform, attached_transform, collate
from gi_segmentation.data.sampling import BalancedSampler, shown_organs
from gi_segmentation.errors import InputError, hub_errors
from gi_segmentation.inference.masks import count_labels, flip_logits, pack_masks, predict_batch
from gi_segmentation.internals import CheckpointLoading, find_train_batch_size
from gi_segmentation.models.heads import (
    all_logits,
    drop_auxiliary_head,
    enable_gradient_checkpointing,
    find_encoder,
    return_auxiliary_logits,
    without_auxiliary_head,
)
from gi_segmentation.schema import LabelMode
from gi_segmentation.scoring.scans import ScanScore
from gi_segmentation.training.averaging import AverageCallback, exchanged_weights, make_average
from gi_segmentation.training.checkpoints import (
    find_checkpoint,
    find_good_checkpoint,
    is_over,
    load_training_weights,
    load_weights,
    read_state,
    save_training_weights,
)
from gi_segmentation.training.evaluation import ComputeMetrics
from gi_segmentation.training.losses import MAX_LOSS, dice_cross_entropy_loss

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


class SegmentationTrainer(CheckpointLoading, Trainer):
    """`Trainer` for semantic segmentation of slices of many sizes.

    Attributes:
        average: The averaged weights while training with `--ema_decay`, else None.
        label_mode: What the model's channels mean, from the training transform.
    """

    loss_is_scaled_for_ga = False  # our loss is the mean of one batch, which Trainer divides by the number of batches

    args: RunArguments
    model: PreTrainedModel

    def __init__(self, *args: Any, balanced: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.balanced = balanced
        self.label_mode: LabelMode = attached_transform(cast(Dataset, self.train_dataset)).label_mode
        self.with_flips = False
        # Kept on the device: to look at every loss as it comes would let the GPU wait for the CPU at every batch.
        self.greatest_loss = torch.zeros((), device=self.args.device)
        self.checked_step = 0
        self.average: AveragedModel | None = None
        if self.args.ema_decay:
            self.average = make_average(self.model, self.args.ema_decay)
            self.add_callback(AverageCallback(self.average))

    def train_sampler(self) -> Sampler:
        """Which slices an epoch draws, and in which order."""
        dataset = cast(Dataset, self.train_dataset)
        if self.balanced:
            return BalancedSampler(shown_organs(dataset), self.args.seed, attached_transform(dataset).epoch)
        return RandomSampler(dataset)

    def get_train_dataloader(self) -> DataLoader:
        """The training batches, without a last batch of a single slice.

        Batch normalisation of a map that is pooled to one pixel (UPerNet, BEiT) needs two slices for a variance, and
        raises where it has one. Other slices are left out in other epochs.
        """
        dataset, batch_size = cast(Dataset, self.train_dataset), find_train_batch_size(self)
        loader = DataLoader(
            dataset,
            batch_size,
            sampler=self.train_sampler(),
            collate_fn=self.data_collator,
            drop_last=len(dataset) > 1 and len(dataset) % batch_size == 1,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
        )
        return cast(DataLoader, self.accelerator.prepare(loader))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer asked for, with a learning rate of its own for what lies behind the encoder."""
        existed = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if existed or self.args.head_lr_multiplier == 1:
            return optimizer
        # Trainer made two groups, with and without weight decay. Each is split again into encoder and head.
        encoder = {id(parameter) for parameter in find_encoder(self.model).parameters()}
        for group in list(optimizer.param_groups):
            head = [parameter for parameter in group["params"] if id(parameter) not in encoder]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in encoder]
            learning_rate = group["lr"] * self.args.head_lr_multiplier
            optimizer.add_param_group({**group, "params": head, "lr": learning_rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """The scheduler asked for, or the one drop of `--lr_drop_at`."""
        if self.args.lr_drop_at is not None and self.lr_scheduler is None:
            drop_step = self.args.lr_drop_at * num_training_steps
            assert self.optimizer is not None  # made before; only the type checker doubts it
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: 1.0 if step < drop_step else 0.1)
        return super().create_scheduler(num_training_steps, optimizer)

    def find_max_steps(self) -> int:
        """Steps of the whole run, as `Trainer` counts them: an epoch's last step may have fewer batches."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        steps_per_epoch = math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)
        return math.ceil(self.args.num_train_epochs * max(steps_per_epoch, 1))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Dice plus cross-entropy at input resolution, of the head and of the auxiliary head if there is one.

        In training Dice is pooled over the slices that all processes have at this moment; `training.losses` has the
        formula. The batches of an accumulated step are not pooled: the step's loss is the mean of theirs.
        """
        outputs = model(pixel_values=inputs["pixel_values"])
        reduce = self.accelerator.reduce if model.training else None
        weights = (1.0, getattr(self.model.config, "auxiliary_loss_weight", 0.0))
        loss = torch.zeros((), device=outputs.logits.device)
        for weight, logits in zip(weights, all_logits(outputs), strict=False):
            arguments = inputs["labels"], self.label_mode, reduce, self.args.world_size
            loss = loss + weight * dice_cross_entropy_loss(logits, *arguments)
        if model.training:
            self.greatest_loss = torch.maximum(self.greatest_loss, loss.detach())  # NaN wins over every number
        return (loss, outputs) if return_outputs else loss

    def check_loss(self) -> None:
        """Stop a run that has stopped learning; called where the Trainer waits for the GPU anyway.

        Raises:
            InputError: If a loss since the last look is not finite, or ten times that of a model that knows nothing.
        """
        greatest, since = self.greatest_loss.item(), self.state.global_step - self.checked_step
        self.greatest_loss.zero_()
        self.checked_step = self.state.global_step
        if greatest < MAX_LOSS:
            return
        good = find_good_checkpoint(Path(self.args.output_dir), self.state.log_history)
        learning_rate = cast(LRScheduler, self.lr_scheduler).get_last_lr()[0]
        raise InputError(
            f"the loss became {greatest:.4g} at step {self.state.global_step}"
            + (f" or in the {since - 1} steps before" if since > 1 else "")
            + f" (learning rate {learning_rate:.3g}); the last good checkpoint is {good or 'none'}; start anew in "
            f"another --output_dir with a lower --learning_rate, or more warm-up"
            + (f", from --model_name_or_path {good}" if good else "")
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, once it is sure that the loss is sound."""
        self.check_loss()
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, flips: bool = False, clinical: bool = False, **kwargs: Any) -> dict[str, float]:
        """Score the weights that are published, without the auxiliary head.

        Args:
            flips: Whether to average logits over flipped slices.
            clinical: Whether to add the scores in millimetres.
            *args: As `Trainer.evaluate`.
            **kwargs: As `Trainer.evaluate`.

        Raises:
            InputError: As `check_loss`: a broken model is neither scored nor saved.
        """
        self.check_loss()
        self.with_flips = flips
        cast(ComputeMetrics, self.compute_metrics).scorer.restart(clinical)
        with exchanged_weights(self.model, self.average), without_auxiliary_head(self.model):
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Loss; in place of logits the organs' masks, packed, and counts of labels; which slices they are."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            logits = flip_logits(model, inputs["pixel_values"]).mean(dim=0) if self.with_flips else outputs.logits
        if prediction_loss_only:
            return loss.detach(), None, None
        masks = pack_masks(predict_batch([logits], self.label_mode, inputs["native_size"]))
        return loss.detach(), (masks, count_labels([logits], self.label_mode, inputs["labels"])), inputs["slice_id"]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights that are published, and beside them those that training goes on from."""
        if self.args.should_save:
            save_training_weights(self.model, self.average, Path(output_dir or self.args.output_dir))
        with exchanged_weights(self.model, self.average), without_auxiliary_head(self.model):
            super().save_model(output_dir, _internal_call)

    def load_training_weights(self, checkpoint: Path) -> None:
        """Load what training goes on from, average and auxiliary head included."""
        load_training_weights(self.model, self.average, checkpoint)

    def load_best_weights(self, checkpoint: Path) -> None:
        """Turn the model into what is published: the best checkpoint's weights, without average and auxiliary head."""
        self.average = None
        drop_auxiliary_head(self.model)
        load_weights(self.model, checkpoint)


def build_trainer(
    model: PreTrainedModel,
    processor: SegformerImageProcessorPil,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    data_args: DataArguments,
    run_args: RunArguments,
) -> SegmentationTrainer:
    """Put model, data, loss and scores together.

    Args:
        model: From `modeling.load_model`.
        processor: Saved with every checkpoint.
        train_dataset: With a `SliceTransform` attached.
        eval_dataset: With a scoring `SliceTransform` attached.
        data_args: How slices are drawn.
        run_args: How to train.

    Raises:
        InputError: If the run is to be published and the Hub refuses that, or the model has no layers to checkpoint.
    """
    return_auxiliary_logits(model)
    if run_args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    callbacks: list[TrainerCallback] = [EpochCallback(attached_transform(train_dataset))]
    if run_args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=run_args.early_stopping_patience))
    share = run_args.process_index, run_args.world_size
    # With --push_to_hub the Trainer makes the repository at once: a wrong token is better known before than after.
    with hub_errors(str(run_args.hub_model_id)):
        return SegmentationTrainer(
            model=model,
            args=run_args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            compute_metrics=ComputeMetrics(eval_dataset, run_args.preset, share),
            callbacks=callbacks,
            balanced=data_args.slice_sampling == "balanced",
        )


class Evaluation(NamedTuple):
    """How the best checkpoint scored.

    Attributes:
        scores: By name, `eval_*` and, with `--test_time_flips`, `eval_flips_*`.
        scans: What they follow from, by prefix.
    """

    scores: dict[str, float]
    scans: dict[str, list[ScanScore]]


def train(trainer: SegmentationTrainer) -> Evaluation:
    """Train to the end, going on where an earlier run of the same command stopped; then score the best checkpoint.

    Returns:
        The scores of the weights that the trainer's model holds afterwards, those in millimetres too.

    Raises:
        InputError: If no checkpoint was scored.
    """
    checkpoint = find_checkpoint(Path(trainer.args.output_dir))
    state = read_state(checkpoint) if checkpoint else None
    if state and is_over(state, trainer.find_max_steps(), trainer.args.early_stopping_patience):
        logger.warning("%s is the end of this run; scoring its best checkpoint", checkpoint)
        trainer.state = state
        if state.best_model_checkpoint is not None:
            trainer.load_best_weights(Path(state.best_model_checkpoint))
    else:
        if checkpoint is not None:
            logger.warning("Resuming from %s", checkpoint)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.best_model_checkpoint is None:
        raise InputError("no checkpoint was scored: train for at least one evaluation (--eval_strategy, --eval_steps)")
    metrics = cast(ComputeMetrics, trainer.compute_metrics)
    scores, scans = trainer.evaluate(clinical=True), {"eval": metrics.scans}
    if trainer.args.test_time_flips:
        scores |= trainer.evaluate(metric_key_prefix="eval_flips", flips=True, clinical=True)
        scans["eval_flips"] = metrics.scans
    return Evaluation(scores, scans)
