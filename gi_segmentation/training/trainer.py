"""The Trainer of this task.

It computes the loss at the resolution of the model's input, and the scores at the native resolution of each slice. At
the end of a training it holds the weights of the best checkpoint.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import torch
from accelerate.utils import load_fsdp_model
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, RandomSampler, Sampler, default_collate
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

from gi_segmentation.arguments import DataArguments, RunArguments, SliceSampling
from gi_segmentation.data.sampling import RepeatedSlices, StreamingSampler, WeightedSampler, weigh_slices
from gi_segmentation.data.streaming import is_index, number_groups
from gi_segmentation.data.transforms import SliceTransform, attached_transform
from gi_segmentation.errors import InputError, StoppedError
from gi_segmentation.internals import CheckpointLoading, find_train_batch_size, speed_up_segformer_head
from gi_segmentation.labels import LabelMode
from gi_segmentation.models.heads import (
    all_logits,
    drop_auxiliary_head,
    enable_gradient_checkpointing,
    find_encoder,
    return_auxiliary_logits,
    without_auxiliary_head,
)
from gi_segmentation.models.masks import (
    count_labels,
    find_flips,
    flip_logits,
    pack_masks,
    predict_batch,
    resize_logits,
)
from gi_segmentation.processes import noticing_lost_processes
from gi_segmentation.scoring.scans import ScanScore
from gi_segmentation.training.averaging import AverageCallback, exchanged_weights, make_average
from gi_segmentation.training.checkpoints import (
    CheckpointCallback,
    explaining_failed_saves,
    find_good_checkpoint,
    find_last_checkpoint,
    find_step,
    is_over,
    load_published_weights,
    load_training_weights,
    read_state,
    save_training_weights,
)
from gi_segmentation.training.evaluation import ComputeMetrics
from gi_segmentation.training.header import HeaderCallback
from gi_segmentation.training.losses import dice_cross_entropy_loss, find_max_loss
from gi_segmentation.training.pictures import find_picture_callback
from gi_segmentation.training.progress import ProgressCallback
from gi_segmentation.training.sharding import UnusedWeightsCallback, check_optimizer
from gi_segmentation.training.stopping import TIME_UP, StopCallback, ignore_signals
from gi_segmentation.training.time_limit import TimeLimit, forget_part, write_part

logger = logging.getLogger(__name__)


class EpochCallback(TrainerCallback):
    """Tells the training transform the number of the epoch, so that each epoch augments the slices differently."""

    def __init__(self, transform: SliceTransform) -> None:
        self.transform = transform

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch before its first slice is read."""
        # After an interruption within an epoch, `state.epoch` has a fraction. `int` drops the fraction, because the
        # rest of this epoch must be drawn and augmented like its beginning. `fill_` changes the tensor in place, so
        # that the processes which load slices see the new number: the tensor lies in shared memory.
        self.transform.epoch.fill_(int(state.epoch or 0))


class SegmentationTrainer(CheckpointLoading, Trainer):
    """`Trainer` for semantic segmentation of slices of many sizes.

    Args:
        slice_sampling: How to draw the training slices, as in `DataArguments`.
        *args: The same as those of `Trainer`.
        **kwargs: The same as those of `Trainer`.

    Attributes:
        transform: Turns batches into the input and the labels of the model; that of the training slices.
        average: The averaged weights during a training with `--ema_decay`; otherwise None.
        label_mode: What the model's channels mean, from the training transform.
        max_loss: A run with a higher loss is stopped.
        with_flips: Whether the current evaluation averages logits over flipped slices.
        greatest_loss: The greatest loss of a training batch since the last `check_loss`.
        checked_step: The step of the last `check_loss`.
    """

    # Gradient accumulation ("ga"): our loss is a mean over one batch. With False, `Trainer` divides the loss by the
    # number of batches of the step, so that a step follows the mean of its batches. With True, the gradient of a step
    # with 4 batches would be 4 times too large.
    loss_is_scaled_for_ga = False

    args: RunArguments
    model: PreTrainedModel

    def __init__(self, *args: Any, slice_sampling: SliceSampling = "all", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slice_sampling: SliceSampling = slice_sampling
        self.transform = attached_transform(cast(Dataset, self.train_dataset))
        self.label_mode: LabelMode = self.transform.label_mode
        self.max_loss = find_max_loss(self.transform.slices.labels)
        self.with_flips = False
        # This number stays on the GPU. Reading each loss from the GPU would make the CPU wait for every batch.
        self.greatest_loss = torch.zeros((), device=self.args.device)
        self.checked_step = 0
        self.average: AveragedModel | None = None
        if self.args.ema_decay:
            self.average = make_average(self.model, self.args.ema_decay)
            self.add_callback(AverageCallback(self.average))

    def train_sampler(self) -> Sampler:
        """Return the sampler that decides which slices an epoch draws, and in which order."""
        dataset = cast(Dataset, self.train_dataset)
        if is_index(dataset):
            loaders = max(self.args.dataloader_num_workers, 1) * self.args.world_size
            settings = loaders, find_train_batch_size(self), self.args.seed, self.transform.epoch
            return StreamingSampler(number_groups(dataset), *settings)
        if (weights := weigh_slices(dataset, self.slice_sampling)) is not None:
            return WeightedSampler(weights, self.args.seed, self.transform.epoch)
        return RandomSampler(dataset)

    def get_train_dataloader(self) -> DataLoader:
        """Return the training batches, without a last batch of a single slice.

        UPerNet and BEiT pool a feature map to one pixel and normalise it over the batch. A variance needs at least two
        values, so PyTorch raises an error for a batch of one slice. Each epoch leaves out another slice.
        """
        # `Trainer` has its own method for this, with `--dataloader_drop_last`. But that flag also drops the last batch
        # of an evaluation, so validation slices would not be scored.
        dataset, batch_size = cast(Dataset, self.train_dataset), find_train_batch_size(self)
        sampler = self.train_sampler()
        loader: DataLoader = DataLoader(
            RepeatedSlices(dataset) if isinstance(sampler, WeightedSampler) else cast(Any, dataset),
            batch_size,
            sampler=sampler,
            collate_fn=self.data_collator,
            drop_last=len(dataset) > 1 and len(dataset) % batch_size == 1,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
            worker_init_fn=ignore_signals,
        )
        # `prepare` gives each process its own batches, and moves them to its device.
        return cast(DataLoader, self.accelerator.prepare(loader))

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return the evaluation batches of `Trainer`."""
        loader = super().get_eval_dataloader(*args, **kwargs)
        loader.worker_init_fn = ignore_signals
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer of `--optim`; layers after the encoder have their own learning rate.

        The encoder is pre-trained and should change slowly. The head has a new task and starts at least partly from
        random weights, so its learning rate is `--head_lr_multiplier` times that of the encoder.
        """
        existed = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        # `Trainer` may call this method several times. The groups of an optimizer are split only once.
        if existed or self.args.head_lr_multiplier == 1:
            return optimizer
        # `Trainer` makes two groups of parameters: with weight decay, and without it (biases and normalisation
        # layers). Each of them is split again into encoder and head, so in the end there are four groups. The
        # scheduler multiplies the learning rate of all groups by the same factor, so their ratio stays the same.
        encoder = {id(parameter) for parameter in find_encoder(self.model).parameters()}
        for group in list(optimizer.param_groups):
            head = [parameter for parameter in group["params"] if id(parameter) not in encoder]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in encoder]
            learning_rate = group["lr"] * self.args.head_lr_multiplier
            optimizer.add_param_group({**group, "params": head, "lr": learning_rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Return the scheduler of `--lr_scheduler_type`, or one that drops the learning rate once (`--lr_drop_at`)."""
        if self.args.lr_drop_at is not None and self.lr_scheduler is None:
            drop_step = self.args.lr_drop_at * num_training_steps
            # `Trainer` creates the optimizer first. The type checker does not know that.
            assert self.optimizer is not None
            # `LambdaLR` multiplies the initial learning rate of each group by this factor.
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: 1.0 if step < drop_step else 0.1)
        return super().create_scheduler(num_training_steps, optimizer)

    def find_max_steps(self) -> int:
        """Return the number of steps of the whole run, as `Trainer` counts them."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        # The last step of an epoch may have fewer batches than the others. Hence `ceil`: with 10 batches and an
        # accumulation of 4, an epoch has the steps 4 + 4 + 2.
        steps_per_epoch = math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)
        return math.ceil(self.args.num_train_epochs * max(steps_per_epoch, 1))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch: Dice plus cross-entropy, at the resolution of the model's input.

        In training, all processes share one Dice: the sums of its formula (`training.losses`) run over the slices of
        all processes. The batches of an accumulated step do not share it: each batch has its own Dice, and the loss of
        the step is the mean over its batches.

        An auxiliary head adds its own loss, times the `auxiliary_loss_weight` of the model's configuration.
        """
        # `Trainer` offers `compute_loss_func` for a loss like this. It would multiply the loss by the number of
        # processes, which is right for a sum over tokens but not for a mean.
        pixel_values, labels = self.transform.to_model(inputs)
        outputs = model(pixel_values=pixel_values)
        loss = self.batch_loss(outputs, labels, model.training, inputs.get("known"))
        if model.training:
            # The maximum of NaN and a number is NaN, so a loss that is not a number is not lost.
            self.greatest_loss = torch.maximum(self.greatest_loss, loss.detach())
        return (loss, outputs) if return_outputs else loss

    def batch_loss(
        self, outputs: Any, labels: torch.Tensor, training: bool, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the loss of the outputs of a model, see `compute_loss`.

        Args:
            outputs: What the model returned.
            labels: From `SliceTransform.to_model`.
            training: Whether this is a batch of the training, and not of an evaluation.
            known: Which organs were drawn in each slice; None: all of them. See `training.losses`.
        """
        # The validation loss only shows whether something is wrong. So it is the mean over the batches of each
        # process, and the processes exchange no sums for it.
        reduce = self.accelerator.reduce if training else None
        weights = (1.0, getattr(self.model.config, "auxiliary_loss_weight", 0.0))
        loss = torch.zeros((), device=outputs.logits.device)
        for weight, logits in zip(weights, all_logits(outputs), strict=False):
            arguments = labels, self.label_mode, reduce, self.args.world_size, known
            loss = loss + weight * dice_cross_entropy_loss(logits, *arguments)
        return loss

    def check_loss(self) -> None:
        """Stop a run that can no longer learn.

        Raises:
            InputError: If a loss since the last call is not finite, or is ten times as high as the loss of a model
                that knows nothing.
        """
        # `item` waits for the GPU. This method is called before each log line and each evaluation, where `Trainer`
        # waits too.
        greatest, since = self.greatest_loss.item(), self.state.global_step - self.checked_step
        self.greatest_loss.zero_()
        self.checked_step = self.state.global_step
        # With NaN this comparison is false, so NaN goes on to the error.
        if greatest < self.max_loss:
            return
        good = find_good_checkpoint(Path(self.args.output_dir), self.state.log_history, self.max_loss)
        learning_rate = cast(LRScheduler, self.lr_scheduler).get_last_lr()[0]
        raise InputError(
            f"the loss became {greatest:.4g} at step {self.state.global_step}"
            + (f" or in the {since - 1} steps before" if since > 1 else "")
            + f" (learning rate {learning_rate:.3g}); the last good checkpoint is {good or 'none'}; start anew in "
            f"another --output_dir with a lower --learning_rate, or more warm-up"
            + (", or in 32 bits (--mixed_precision no)" if self.accelerator.mixed_precision == "fp16" else "")
            + (f", from --model_name_or_path {good}" if good else "")
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Check the loss, then log."""
        self.check_loss()
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, flips: bool = False, thorough: bool = False, **kwargs: Any) -> dict[str, float]:
        """Score the weights that would be published: averaged if `--ema_decay` is set, without the auxiliary head.

        Args:
            flips: Whether to average logits over flipped slices.
            thorough: Whether to add the scores by all presets, and those in millimetres.
            *args: The same as those of `Trainer.evaluate`.
            **kwargs: The same as those of `Trainer.evaluate`.

        Raises:
            InputError: If `check_loss` finds that the model is broken. Such a model is neither scored nor saved.
        """
        # `Trainer` evaluates first and saves a checkpoint afterwards. So this check protects both.
        self.check_loss()
        self.with_flips = flips
        cast(ComputeMetrics, self.compute_metrics).scorer.restart(clinical=thorough, presets=thorough)
        with exchanged_weights(self.model, self.average), without_auxiliary_head(self.model):
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Return what `ComputeMetrics` needs of a batch: predicted masks and label counts in place of logits.

        Returns:
            The loss; the masks of the organs, packed to bits, together with label counts; the ids of the slices.
        """
        # `Trainer` collects these results from all processes. Logits of one slice take 4 bytes per pixel and channel,
        # and packed masks take a bit per pixel and organ. The masks have the native size of their slice, because the
        # scores are computed there.
        pixel_values, labels = self.transform.to_model(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(pixel_values=pixel_values)
            logits = outputs.logits
            # The loss and the counts share the logits at the size of the labels.
            (counted,) = resize_logits([logits], *labels.shape[-2:])
            outputs.logits = counted
            known = inputs.get("known")
            loss = self.batch_loss(outputs, labels, training=False, known=known)
            if self.with_flips:
                axes = find_flips(self.transform.slices.labels)
                logits = counted = flip_logits(model, pixel_values, axes).mean(dim=0)
        if prediction_loss_only:
            return loss.detach(), None, None
        masks = pack_masks(predict_batch([logits], self.label_mode, inputs["native_size"]))
        return loss.detach(), (masks, count_labels([counted], self.label_mode, labels, known)), inputs["slice_id"]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights to publish, and beside them the weights from which an interrupted training continues."""
        # `should_save` is true on the main process only. All processes have the same weights. FSDP and DeepSpeed save
        # the weights of the last step themselves, together with the state of the optimizer.
        if self.args.should_save and self.args.sharding is None:
            save_training_weights(self.model, self.average, Path(output_dir or self.args.output_dir))
        # `Trainer` writes what the model holds at this moment: its averaged weights, without the auxiliary head.
        with exchanged_weights(self.model, self.average), without_auxiliary_head(self.model):
            if self.args.sharding == "FSDP":
                self.save_whole_model(Path(output_dir or self.args.output_dir))
            else:
                super().save_model(output_dir, _internal_call)

    def save_whole_model(self, output_dir: Path) -> None:
        """Save a model that FSDP has divided as one that was never divided."""
        # All processes give their parts. Only the main process gets the whole tensors.
        tensors = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            # FSDP has changed the class of the model. `transformers` writes a SegFormer of the new class with other
            # names of tensors than its original class, and older releases do not know these names. A call of the new
            # class makes a model of the original class.
            model = type(self.model)(self.model.config)
            model.load_state_dict(tensors)
            model.save_pretrained(output_dir)
            cast(SegformerImageProcessorPil, self.processing_class).save_pretrained(output_dir)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Do nothing. `Trainer` would create the repository here, and an error of the Hub would end the run."""
        # `publishing.hub` does it.

    def load_training_weights(self, checkpoint: Path) -> None:
        """Load the weights from which training continues, and the averaged weights."""
        # With DeepSpeed, `Trainer` does not call this method.
        if self.args.sharding == "FSDP":
            load_fsdp_model(self.accelerator.state.fsdp_plugin, self.accelerator, self.model, str(checkpoint))
        else:
            load_training_weights(self.model, self.average, checkpoint)

    def load_best_weights(self, checkpoint: Path) -> None:
        """Turn the model into the one that is published: the best checkpoint, without an auxiliary head."""
        # The published weights of a checkpoint are the averaged ones. From here on, `evaluate` must not exchange them
        # for the average at the end of the training.
        self.average = None
        drop_auxiliary_head(self.model)
        load_published_weights(self.model, checkpoint)

    def disconnect(self) -> None:
        """Disconnect the processes of the run. Without this, they sometimes abort or hang when the program ends."""
        # DistributedDataParallel has a hold on the connection, so it goes first. If it went last, it would end the
        # connection while it holds the lock of Python's interpreter. It would then wait forever for a thread of the
        # connection, which may wait for this lock.
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()


def build_trainer(
    model: PreTrainedModel,
    processor: SegformerImageProcessorPil,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    data_args: DataArguments,
    run_args: RunArguments,
) -> SegmentationTrainer:
    """Return the trainer of a run.

    Args:
        model: From `models.loading.load_model`.
        processor: The model's image processor. It is saved with every checkpoint.
        train_dataset: The training split with a `SliceTransform` attached.
        eval_dataset: The validation split with a scoring `SliceTransform` attached. It is empty with `--fold all`.
        data_args: Says how slices are drawn.
        run_args: Says how to train.

    Raises:
        InputError: If `--gradient_checkpointing` is set but the model does not support it.
    """
    return_auxiliary_logits(model)
    # Convolutions are faster if the channels of a pixel are neighbours in memory: for an EfficientNet by a third on a
    # CPU. The other families consist mostly of matrix products, and a SegFormer becomes slower. FSDP can divide only
    # weights in the usual order.
    if model.config.model_type == "upernet" and run_args.sharding != "FSDP":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]
    if run_args.fast_head:
        speed_up_segformer_head(model)
    # `Trainer` switches gradient checkpointing on when the training starts. This call makes that possible for ConvNeXt
    # backbones, and stops here for a family that cannot do it.
    if run_args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    callbacks: list[TrainerCallback] = [
        EpochCallback(attached_transform(train_dataset)),
        CheckpointCallback(run_args.save_total_limit),
        HeaderCallback(train_dataset, eval_dataset),
        ProgressCallback(),
    ]
    if run_args.sharding == "FSDP":
        # `accelerate` asks for the embeddings of words, to divide them apart. A SegFormer answers with an error.
        setattr(model, "get_input_embeddings", lambda: None)  # noqa: B010 - the type checker knows modules only
        callbacks.append(UnusedWeightsCallback())
    if run_args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=run_args.early_stopping_patience))
    # Every process gets the predictions of all slices, and scores its own share of the scans.
    share = run_args.process_index, run_args.world_size
    metrics = ComputeMetrics(eval_dataset, run_args.preset, share) if len(eval_dataset) else None
    trainer = SegmentationTrainer(
        model=model,
        args=run_args,
        data_collator=default_collate,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset if len(eval_dataset) else None,
        processing_class=processor,
        compute_metrics=metrics,
        callbacks=callbacks,
        slice_sampling=data_args.slice_sampling,
    )
    # `Trainer` makes the callbacks of `--report_to`.
    for callback in find_picture_callback(eval_dataset, metrics, trainer.callback_handler.callbacks, run_args):
        trainer.add_callback(callback)
    return trainer


class Evaluation(NamedTuple):
    """The scores of the best checkpoint. With `--fold all`, both attributes are empty.

    Attributes:
        scores: The scores by name: `eval_*` and, with `--test_time_flips`, `eval_flips_*`.
        scans: The scores of the single scans, from which `scores` follow, by prefix: `eval` and `eval_flips`.
    """

    scores: dict[str, float]
    scans: dict[str, list[ScanScore]]


def train_on(trainer: SegmentationTrainer, checkpoint: Path | None, started_s: float) -> None:
    """Train to the end, from the start or from a checkpoint.

    Args:
        trainer: The trainer.
        checkpoint: Where the training goes on; None: it starts.
        started_s: When the command started, by `time.monotonic`.

    Raises:
        StoppedError: If SIGTERM or Ctrl-C came, or the time of `--max_hours` is nearly up. The last checkpoint is then
            that of the last step.
        InputError: If a checkpoint cannot be written.
    """
    args = trainer.args
    limit = TimeLimit(args.max_hours, started_s, len(cast(Dataset, trainer.eval_dataset or ())))
    stop = StopCallback(limit)
    trainer.add_callback(limit)
    trainer.add_callback(stop)
    # `Trainer` restores the optimizer, the scheduler, the random numbers and the place in the epoch. Our methods
    # `load_training_weights` and, at the end, `load_best_weights` restore the weights.
    # `noticing_lost_processes` is the inner block: if another process ends while a checkpoint is written, the message
    # must name the lost process, and not the disk.
    with stop.listening(), explaining_failed_saves(trainer), noticing_lost_processes():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # FSDP and DeepSpeed cannot score a finished run in a start of its own, see `train`.
    if not stop.number and args.sharding is None and limit.lacks_scoring(args.test_time_flips):
        stop.number = TIME_UP
    # The signal may have come after the last step.
    if stop.agree(stop.ask_all(args)):
        end_part(trainer, stop.number)


def end_part(trainer: SegmentationTrainer, number: int) -> NoReturn:
    """End a start that has trained some of the steps.

    Args:
        trainer: The trainer, when its last step is saved.
        number: The signal, or `TIME_UP`.

    Raises:
        StoppedError: Always.
    """
    state, output_dir = trainer.state, Path(trainer.args.output_dir)
    over = is_over(state, state.max_steps, trainer.args.early_stopping_patience)
    left = "only scores the best checkpoint" if over else "goes on from there"
    saved = f"at step {state.global_step} of {state.max_steps}, and saved it in {output_dir}; the same command {left}"
    trainer.disconnect()
    if number != TIME_UP:
        raise StoppedError(f"stopped {saved}", 128 + number)
    if trainer.args.process_index == 0:
        write_part(output_dir, state)
    raise StoppedError(f"part done: --max_hours {trainer.args.max_hours:g} is nearly over; stopped {saved}", 0)


def train(trainer: SegmentationTrainer, started_s: float | None = None) -> Evaluation:
    """Train to the end, then score the best checkpoint.

    With `--fold all`, no slices are held back. Then nothing is scored, and the last checkpoint takes the place of the
    best one.

    If an earlier run of the same command was interrupted, training continues from its last checkpoint. If the earlier
    run is over, only the best checkpoint is scored.

    Args:
        trainer: The trainer.
        started_s: When the command started, by `time.monotonic`; None: now.

    Returns:
        The scores of the best checkpoint, with those in millimetres. The trainer's model then holds its weights.

    Raises:
        InputError: If no checkpoint was scored, if FSDP or DeepSpeed cannot go on from the last checkpoint, or as
            `train_on`.
        StoppedError: As `train_on`.
    """
    if trainer.args.process_index == 0:
        forget_part(Path(trainer.args.output_dir))
    checkpoint = find_last_checkpoint(Path(trainer.args.output_dir))
    state = read_state(checkpoint) if checkpoint else None
    if state and is_over(state, trainer.find_max_steps(), trainer.args.early_stopping_patience):
        if trainer.args.sharding is not None:
            raise InputError(
                f"{checkpoint} is the end of this run, and {trainer.args.sharding} cannot score without training; run "
                f"the same command with accelerate_configs/single_gpu.yaml"
            )
        logger.warning("%s is the end of this run; scoring its best checkpoint", checkpoint)
        trainer.state = state
        if state.best_model_checkpoint is not None:
            trainer.load_best_weights(Path(state.best_model_checkpoint))
    else:
        if checkpoint is not None:
            check_optimizer(checkpoint, trainer.args.sharding, trainer.args.world_size)
            logger.warning("Resuming from %s", checkpoint)
        train_on(trainer, checkpoint, time.monotonic() if started_s is None else started_s)
    if trainer.eval_dataset is None:
        last = cast(Path, find_last_checkpoint(Path(trainer.args.output_dir)))
        trainer.load_best_weights(last)
        trainer.state.best_model_checkpoint, trainer.state.best_global_step = str(last), find_step(last)
        return Evaluation({}, {})
    if trainer.state.best_model_checkpoint is None:
        raise InputError("no checkpoint was scored: train for at least one evaluation (--eval_strategy, --eval_steps)")
    # During the training only the fast scores are computed. Surface distances take longer, so they come once, here.
    metrics = cast(ComputeMetrics, trainer.compute_metrics)
    scores, scans = trainer.evaluate(thorough=True), {"eval": metrics.scans}
    if trainer.args.test_time_flips:
        scores |= trainer.evaluate(metric_key_prefix="eval_flips", flips=True, thorough=True)
        scans["eval_flips"] = metrics.scans
    return Evaluation(scores, scans)
