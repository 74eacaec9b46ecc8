"""Datasets in, batches out: formatting and tokenisation, packing, collation, and the alignment of two tokenizers."""

from trl_kd.data.alignment import TokenBytes, align, align_row, vocabulary_map
from trl_kd.data.collator import KDCollator, completed_row, rows_of
from trl_kd.data.dual import DualCollator, Side, TeacherRows
from trl_kd.data.formatting import (
    has_completions,
    is_conversational,
    is_plain_text,
    map_rows,
    pack,
    prepare_dataset,
    row_formatter,
)
from trl_kd.data.teacher_prompt import TeacherPrompt, teacher_view


__all__ = [
    "DualCollator",
    "KDCollator",
    "Side",
    "TeacherPrompt",
    "TeacherRows",
    "TokenBytes",
    "align",
    "align_row",
    "completed_row",
    "has_completions",
    "is_conversational",
    "is_plain_text",
    "map_rows",
    "pack",
    "prepare_dataset",
    "row_formatter",
    "rows_of",
    "teacher_view",
    "vocabulary_map",
]
