"""The card templates `model_card.md` and `dataset_card.md`. `gi_segmentation.publishing.cards` fills them."""
