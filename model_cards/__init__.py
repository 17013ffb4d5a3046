"""Card templates, filled by `gi_segmentation.card`: `model_card.md` and `dataset_card.md`."""
