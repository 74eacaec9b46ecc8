"""Datasets in, batches out: formatting and tokenisation of rows, packing, and collation."""

from trl_kd.data.collator import KDCollator, rows_of
from trl_kd.data.formatting import has_completions, is_plain_text, pack, prepare_dataset


__all__ = ["KDCollator", "has_completions", "is_plain_text", "pack", "prepare_dataset", "rows_of"]
