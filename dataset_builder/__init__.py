"""Turn the UW-Madison GI Tract data of Kaggle into a `datasets` dataset.

Importing this package teaches `datasets.load_dataset` the name "gi_tract":
`load_dataset("gi_tract", data_dir=KAGGLE_DIR)`.
"""

from dataset_builder.gi_tract import register

register()
