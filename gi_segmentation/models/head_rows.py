"""The rows of a segmentation head, one per label: take those of a checkpoint over by the names of their labels."""

import copy

import torch
from transformers import PreTrainedModel

from gi_segmentation.labels import BACKGROUND
from gi_segmentation.models.configuration import Task


def make_label_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors whose size follows from the labels, by name, with new random values.

    These are the weights and the bias of the last layer of each head. Their first axis has the labels.
    """
    fresh, wider = copy.deepcopy(model.config), copy.deepcopy(model.config)
    wider.num_labels = len(fresh.id2label or {}) + 1
    new, other = (type(model)(config).state_dict() for config in (fresh, wider))
    return {name: tensor for name, tensor in new.items() if tensor.shape != other[name].shape}


def keep_rows(model: PreTrainedModel, original: PreTrainedModel, theirs: Task, ours: Task) -> list[str]:
    """Copy the rows of the labels that a checkpoint and a new model both have.

    A row gives the logit of its label. The two modes use logits in other ways:

    - `multiclass` to `multilabel`: with a background and one organ, the softmax of an organ is the sigmoid of its
      logit minus the background's. So the organ's row minus the background's row is taken.
    - `multilabel` to `multiclass`: the other way round, a background of 0 beside one organ gives this sigmoid. So the
      rows of the organs stay as they are, and the background gets zeros, if any organ is kept.

    Args:
        model: The new model. Its rows of other labels keep their random values.
        original: The checkpoint with its own labels.
        theirs: What the checkpoint predicts.
        ours: What the new model predicts.

    Returns:
        The labels that were kept, in the order of the new model.
    """
    kept = [name for name in ours.channels if name in theirs.channels]
    to, rows = ([task.channels.index(name) for name in kept] for task in (ours, theirs))
    target, source = model.state_dict(), original.state_dict()
    for name in make_label_tensors(model) if kept else ():
        if ours.label_mode == "multilabel" and theirs.label_mode == "multiclass":
            target[name][to] = source[name][rows] - source[name][0]
            continue
        target[name][to] = source[name][rows]
        if ours.label_mode == "multiclass" and BACKGROUND not in kept:
            target[name][0] = 0
    return kept
