"""`python -m dataset_builder convert`: from scans and what was drawn on them to a Kaggle folder."""
