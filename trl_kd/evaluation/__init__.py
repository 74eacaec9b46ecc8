"""Comparison of a student with its teacher."""

from trl_kd.evaluation.fidelity import (
    FIDELITY_METRICS,
    evaluate_fidelity,
    fidelity_table,
    format_metric,
    sample_completions,
)


__all__ = ["FIDELITY_METRICS", "evaluate_fidelity", "fidelity_table", "format_metric", "sample_completions"]
