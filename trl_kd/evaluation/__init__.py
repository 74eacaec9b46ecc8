"""What distillation changed: measures with error bars, their store, their comparison and its report."""

from importlib import import_module


# Public name -> the module that defines it
_MODULES = {
    name: module
    for module, names in {
        "bootstrap": ("Estimate", "difference", "estimate", "verdict"),
        "card": ("evaluation_section", "update_model_card"),
        "comparison": ("Change", "ComparedModel", "Comparison", "compare_run"),
        "cost": ("measure_cost", "price_per_million_tokens"),
        "fidelity": (
            *("FIDELITY_METRICS", "evaluate_fidelity", "fidelity_table", "format_metric", "sample_completions"),
        ),
        "harness": ("run_harness",),
        "judge": ("Judge", "Preference", "judge_pairs", "preference_summary"),
        "measures": ("MEASURES", "Measure", "measure_of"),
        "metrics": ("METRIC_MODULES", "load_metric", "text_values"),
        "models": ("EvalModel",),
        "per_token": ("compare_rows", "likelihood_rows"),
        "regression": ("Condition", "parse_condition"),
        "report": ("write_report",),
        "runner": ("Evaluation",),
        "store": ("ModelEntry", "ResultStore", "Run", "RunInfo", "Sample"),
        "suite": ("EvalRow", "Suite", "load_suite", "plain_suite", "read_rows"),
    }.items()
    for name in names
}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    """Load a public name from its module (PEP 562): a report needs no model, and a measure no page."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the lazy names too, for completion in shells and editors."""
    return sorted({*globals(), *_MODULES})
