"""The Trainer of this task: loss at input resolution, scores at native resolution, the right checkpoint at the end."""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Sampler
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
from gi_segmentation.data.preprocessing import SliceTransform, collate
from gi_segmentation.data.sampling import BalancedSampler, shown_organs
from gi_segmentation.data.slices import attached_transform
from gi_segmentation.errors import InputError, hub_errors
from gi_segmentation.inference.masks import count_labels, flip_logits, pack_masks, predict_batch
from gi_segmentation.models.heads import (
    all_logits,
    drop_auxiliary_head,
    enable_gradient_checkpointing,
    find_encoder,
    return_auxiliary_logits,
    without_auxiliary_head,
)
from gi_segmentation.scoring.scans import ScanScore
from gi_segmentation.training.averaging import AverageCallback, average_weights, exchanged_weights
from gi_segmentation.training.checkpoints import (
    TRAINING_WEIGHTS,
    find_checkpoint,
    last_good_checkpoint,
    load_weights,
)
from gi_segmentation.training.evaluation import ComputeMetrics
from gi_segmentation.training.losses import MAX_LOSS, cross_entropy_loss, dice_sums, resize_logits, soft_dice_loss

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


class SegmentationTrainer(Trainer):
    """`Trainer` for semantic segmentation of slices of many sizes.

    A checkpoint's `model.safetensors` is what is scored and published: weights averaged if so asked, and no auxiliary
    head. Where training goes on from others, these lie in `training_weights.safetensors` beside it.

    Attributes:
        average: The averaged weights while training with `--ema_decay`, else None.
        step_batches: The batches of this process that make up a step.
        step_sums: Per head what soft Dice needs of all slices of the step, where these come in several batches.
        flips: Whether evaluation averages over flipped slices.
    """

    loss_is_scaled_for_ga = False  # our loss is the mean of one batch

    args: RunArguments
    model: PreTrainedModel

    def __init__(self, *args: Any, balanced: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.balanced = balanced
        self.average: AveragedModel | None = None
        self.step_batches: list[dict[str, Any]] = []
        self.step_sums: list[torch.Tensor] | None = None
        self.step_slices = 0
        self.flips = False
        if self.args.ema_decay:
            averaging = partial(average_weights, decay=self.args.ema_decay)
            self.average = AveragedModel(self.model, multi_avg_fn=averaging, use_buffers=True)
            self.add_callback(AverageCallback(self))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = cast(Dataset, train_dataset or self.train_dataset)
        if not self.balanced:
            return super()._get_train_sampler(dataset)
        return BalancedSampler(shown_organs(dataset), self.args.seed, attached_transform(dataset).epoch)

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

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer asked for, with a learning rate of its own for what lies behind the encoder."""
        existed = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if existed or self.args.head_lr_multiplier == 1:
            return optimizer
        encoder = {id(parameter) for parameter in find_encoder(self.model).parameters()}
        for group in list(optimizer.param_groups):
            head = [parameter for parameter in group["params"] if id(parameter) not in encoder]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in encoder]
            learning_rate = group["lr"] * self.args.head_lr_multiplier
            optimizer.add_param_group({**group, "params": head, "lr": learning_rate})
        return optimizer

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One epoch; none where a resumed run is over, for which `Trainer` would take a step more."""
        stopped = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of one step, also kept to be looked at before the first gradient."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_batches, self.step_sums = batches, None
        self.step_slices = sum(len(batch["labels"]) for batch in batches)
        return batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward pass of one batch, before the first of several a look at all of them."""
        if len(self.step_batches) > 1 and self.step_sums is None:
            self.step_sums = self.pool_step()
        return super().training_step(model, inputs, num_items_in_batch)

    def pool_step(self) -> list[torch.Tensor]:
        """What soft Dice needs of all batches of this step, per head.

        It costs a forward pass without gradient, which draws the same random numbers as the pass that follows, and
        leaves no trace in the statistics of batch normalisation.
        """
        self.model.train()
        norms = [module for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), self.compute_loss_context_manager():
            for norm in norms:
                norm.track_running_stats = False
            sums = [self.head_sums(self._prepare_inputs(batch)) for batch in self.step_batches]
            for norm in norms:
                norm.track_running_stats = True
        return [self.accelerator.reduce(torch.stack(head).sum(dim=0)) for head in zip(*sums, strict=True)]

    def head_sums(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """What soft Dice needs of a batch, for the head and the auxiliary head if there is one."""
        outputs, labels = self.model(pixel_values=inputs["pixel_values"]), inputs["labels"]
        return [dice_sums(resize_logits(logits, labels), labels) for logits in all_logits(outputs)]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Dice, pooled over all slices of the step, plus cross-entropy on the logits at input resolution.

        The mean over the batches and processes of a step is the loss of all its slices, and so are the gradients.
        """
        outputs = model(pixel_values=inputs["pixel_values"])
        weights = (1.0, getattr(self.model.config, "auxiliary_loss_weight", 0.0))
        losses = [self.head_loss(index, logits, inputs["labels"]) for index, logits in enumerate(all_logits(outputs))]
        loss = torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=False)]).sum()
        if model.training:
            self.check_loss(loss.item())
        return (loss, outputs) if return_outputs else loss

    def head_loss(self, index: int, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of one head: its own share of the gradient, the whole step's value."""
        logits = resize_logits(logits, labels)
        sums, entropy = dice_sums(logits, labels), cross_entropy_loss(logits, labels)
        batches = self.args.world_size * (self.current_gradient_accumulation_steps if self.step_sums else 1)
        if not self.model.training or batches == 1:
            return soft_dice_loss(sums) + entropy
        pooled = self.step_sums[index] if self.step_sums else self.accelerator.reduce(sums.detach().clone())
        dice = soft_dice_loss(sums + (pooled - sums).detach())
        share = len(labels) / (self.step_slices * self.args.world_size)
        return dice.detach() + batches * (dice - dice.detach() + share * entropy)

    def check_loss(self, loss: float) -> None:
        """Stop a run that learns nothing any more.

        Raises:
            InputError: If the loss is not finite, or ten times that of a model that knows nothing.
        """
        if loss < MAX_LOSS:
            return
        good = last_good_checkpoint(Path(self.args.output_dir), self.state.log_history)
        raise InputError(
            f"the loss became {loss:.4g} at step {self.state.global_step + 1} (learning rate "
            f"{self._get_learning_rate():.3g}); the last good checkpoint is {good or 'none'}; start anew in another "
            f"--output_dir with a lower --learning_rate, or more warm-up"
            + (f", from --model_name_or_path {good}" if good else "")
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the weights that are published, without the auxiliary head."""
        with exchanged_weights(self.model, self.average), without_auxiliary_head(self.model):
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Loss, and in place of logits the organs' masks, packed, and counts of labels; which slices they are."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            logits = flip_logits(model, inputs["pixel_values"]).mean(dim=0) if self.flips else outputs.logits
        if prediction_loss_only:
            return loss.detach(), None, None
        masks = predict_batch([logits], inputs["native_size"])
        return loss.detach(), (pack_masks(masks), count_labels([logits], inputs["labels"])), inputs["slice_id"]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and self.needs_training_weights():
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: t.contiguous() for name, t in self.model.state_dict().items()}, folder / TRAINING_WEIGHTS)
        with exchanged_weights(self.model, self.average), without_auxiliary_head(self.model):
            super()._save(output_dir, state_dict)

    def needs_training_weights(self) -> bool:
        """Whether training goes on from other weights than those published."""
        return self.average is not None or getattr(self.model, "auxiliary_head", None) is not None

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
        checkpoint = Path(resume_from_checkpoint)
        with without_auxiliary_head(self.model):
            load_weights(self.model, checkpoint)
        if self.average is not None:
            self.average.module.load_state_dict(self.model.state_dict())
            self.average.n_averaged.fill_(int(checkpoint.name.rsplit("-", 1)[-1]))
        if self.needs_training_weights():
            self.model.load_state_dict(load_file(checkpoint / TRAINING_WEIGHTS))

    def _load_best_model(self) -> None:
        """Turn the model into what is published: the best checkpoint's weights."""
        self.average = None
        drop_auxiliary_head(self.model)
        load_weights(self.model, Path(self.state.best_model_checkpoint or ""))


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
            compute_metrics=ComputeMetrics(eval_dataset, run_args.competition_preset, share),
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
    if checkpoint is not None:
        logger.warning("Resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.best_model_checkpoint is None:
        raise InputError("no checkpoint was scored: train for at least one evaluation (--eval_strategy, --eval_steps)")
    metrics = cast(ComputeMetrics, trainer.compute_metrics)
    metrics.scorer.clinical = True
    scores, scans = trainer.evaluate(), {"eval": metrics.scans}
    if trainer.args.test_time_flips:
        trainer.flips = True
        scores |= trainer.evaluate(metric_key_prefix="eval_flips")
        scans["eval_flips"] = metrics.scans
    return Evaluation(scores, scans)
