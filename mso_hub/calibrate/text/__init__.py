"""Data sets -> token rows for a model: `read_text` is the entry, `TextSettings` says what is wanted.

settings      nouns: which data sets, in which shares, how many rows
yaml_file     --dataset_yaml -> settings
place         where a data set lies -> Opened
files         .jsonl and .txt, without any package
through_datasets   everything else, through the package `datasets`
python_docs   the built-in text, without network
formatters    a row -> text or turns
tokenizer     the checkpoint's own tokenizer -> ids
rows          packing, batches, the digest
read          all of it, in one call
"""

from __future__ import annotations

from mso_hub.calibrate.text.read import read_text
from mso_hub.calibrate.text.rows import Rows, Share
from mso_hub.calibrate.text.settings import PYTHON_DOCS, DataSet, TextSettings, named_dataset, one_dataset
from mso_hub.calibrate.text.tokenizer import open_tokenizer
from mso_hub.calibrate.text.yaml_file import read_dataset_yaml

__all__ = [
    "PYTHON_DOCS",
    "DataSet",
    "Rows",
    "Share",
    "TextSettings",
    "named_dataset",
    "one_dataset",
    "open_tokenizer",
    "read_dataset_yaml",
    "read_text",
]
