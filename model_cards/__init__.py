"""Card templates, filled by `gi_segmentation.publishing.cards`: `model_card.md` and `dataset_card.md`."""
