"""The tables of a bench: means over seeds, differences to a baseline with their error bars, and what cells took."""

import hashlib
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_kd.evaluation.bootstrap import difference, verdict
from trl_kd.evaluation.measures import Measure, measure_of
from trl_kd.scripts.bench_config import BEFORE, TEACHER, BenchConfig, Cell
from trl_kd.scripts.bench_methods import METHODS


if TYPE_CHECKING:
    from rich.console import Console


SUMS_RIGHT = Measure("sums right", "%", True, "share of stories whose numbers are all right", digits=1)
TITLES = {TEACHER: "teacher", BEFORE: "student before"}
# Kept of each prompt, and shown as something else
_TEACHER_NLL = "own_teacher_nll"


def measure(name: str) -> Measure:
    """How to speak of a measure."""
    return SUMS_RIGHT if name == "sums_right" else measure_of(name)


def _values(samples: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """A measure of a cell by prompt, with weights."""
    pairs = [sample["values"].get(name, (0.0, 0.0)) for sample in samples]
    values, weights = zip(*pairs, strict=True)
    return list(values), list(weights)


def spread(numbers: Sequence[float], digits: int) -> str:
    """Mean, and standard deviation if there are several."""
    # + 0.0: not "-0.000"
    text = f"{round(statistics.mean(numbers), digits) + 0.0:,.{digits}f}"
    return f"{text} ± {statistics.stdev(numbers):,.{digits}f}" if len(numbers) > 1 else text


@dataclass(frozen=True)
class Results:
    r"""
    All cells of a bench.

    Args:
        config ([`~trl_kd.scripts.bench_config.BenchConfig`]):
            The bench.
        cells (`dict[str, list[dict[str, Any]]]`):
            What was written of each model, by its name, one for each seed.
        reasons (`dict[str, str]`):
            Why methods are missing.
        command (`str`):
            What makes it again.
    """

    config: BenchConfig
    cells: dict[str, list[dict[str, Any]]]
    reasons: dict[str, str]
    command: str

    @classmethod
    def read(
        cls, config: BenchConfig, folder: Path, cells: Sequence[Cell], reasons: dict[str, str], command: str
    ) -> "Results":
        """From the files of the cells."""
        found: dict[str, list[dict[str, Any]]] = {}
        for cell in cells:
            found.setdefault(cell.name, []).append(json.loads(cell.file(folder).read_text(encoding="utf-8")))
        return cls(config, found, reasons, command)

    @cached_property
    def metrics(self) -> list[str]:
        """Measures that are shown, those of the text first."""
        there = {name for cell in self.cells[BEFORE] for sample in cell["samples"] for name in sample["values"]}
        order = ["sums_right", "exact_match", "rouge_l", "nll", "total_variation", "own_total_variation"]
        order += ["own_reverse_kl", "imitation_gap", "own_entropy"]
        if _TEACHER_NLL in there:
            there.add("imitation_gap")
        asked = [*self.config.evaluation.get("metrics", ()), "sums_right"]
        others = [name for name in asked if name not in order]
        return [name for name in order + others if name in there and name in asked]

    def arrays(self, name: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """A measure of a model, values and weights of shape `(S, P)`: seeds of training, prompts."""
        kept = _TEACHER_NLL if metric == "imitation_gap" else metric
        pairs = [_values(cell["samples"], kept) for cell in self.cells[name]]
        values, weights = (np.array(part) for part in zip(*pairs, strict=True))
        if metric == "imitation_gap":
            by_teacher = self.arrays(TEACHER, _TEACHER_NLL)
            values = values - np.average(by_teacher[0], weights=by_teacher[1])
        return values, weights

    def by_seed(self, name: str, metric: str) -> list[float]:
        """A measure of a model, one value for each seed of training."""
        values, weights = self.arrays(name, metric)
        return [float(np.average(v, weights=w)) for v, w in zip(values, weights, strict=True)]

    def title(self, name: str) -> str:
        """Name of a model in the tables."""
        return METHODS[name].title if name in METHODS else TITLES[name]

    def table(self) -> list[list[str]]:
        """Header and rows: measures and costs, mean and standard deviation over seeds of training."""
        costs = {"loss": ("final loss", 3), "seconds": ("seconds", 0), "student_tokens": ("student tokens", 0)}
        rows = [["model", *(measure(name).title for name in self.metrics), *(title for title, _ in costs.values())]]
        for name, cells in self.cells.items():
            row = [self.title(name)]
            row += [spread(self.by_seed(name, metric), measure(metric).digits) for metric in self.metrics]
            for cost, (_, digits) in costs.items():
                is_trained = cells[0]["training"] is not None
                row.append(spread([cell["training"][cost] for cell in cells], digits) if is_trained else "")
            rows.append(row)
        return rows

    def differences(self, with_intervals: bool = True) -> list[list[str]]:
        """Header and rows: each method less the baseline, and what that says; nothing without the baseline."""
        baseline = self.config.baseline
        others = [name for name in self.cells if name in METHODS and name != baseline]
        if baseline not in self.cells or not others:
            return []
        rows = [["method", *(measure(name).title for name in self.metrics)]]
        for name in others:
            changes = [self._difference(name, baseline, metric, with_intervals) for metric in self.metrics]
            rows.append([self.title(name), *changes])
        return rows

    def _difference(self, name: str, baseline: str, metric: str, with_interval: bool) -> str:
        change = difference(self.arrays(name, metric), self.arrays(baseline, metric))
        digits, says = measure(metric).digits, verdict(change, measure(metric).higher_is_better)
        value, low, high = (f"{round(x, digits) + 0.0:+.{digits}f}" for x in (change.value, change.low, change.high))
        if with_interval:
            return f"{value} [{low}, {high}] {says.removesuffix(' at 95 %')}"
        return f"{value} {'~' if says.startswith('not') else says}"

    def explanation(self) -> str:
        """What the numbers are, in words."""
        config, versions = self.config, self.cells[TEACHER][0]["settings"]["versions"]
        listed = ", ".join(f"{name} {versions[name]}" for name in ("trl_kd", "trl", "transformers", "torch"))
        teacher, student = (self.cells[name][0]["model"]["parameters"] for name in (TEACHER, BEFORE))
        count = len(self.cells[TEACHER][0]["samples"])
        threads = f", {config.threads} thread{'s' if config.threads > 1 else ''} each" if config.threads else ""
        return (
            f"Teacher `{config.teacher}` ({teacher:,} parameters), student `{config.student}` ({student:,}), data "
            f"`{config.data}`. Each method starts from the same student and takes {config.steps} optimizer steps of "
            f"{config.batch_size} rows with at most {config.max_completion_length} trained tokens. Mean ± standard "
            f"deviation over {len(config.seeds)} training seed{'s' if len(config.seeds) > 1 else ''}; {count} "
            "held-out prompts, one completion each, the same noise for every model. Student tokens: prompts and "
            "completions that the student has read in training forwards, counted. Losses of different methods are "
            f"different quantities. Seconds of training, with other cells running beside. {listed}, Python "
            f"{platform.python_version()}, {os.cpu_count()} cores{threads}."
        )

    def legend(self) -> str:
        """What the measures are."""
        each = (measure(name) for name in self.metrics)
        return "; ".join(f"**{one.title}**{f' ({one.unit})' if one.unit else ''}: {one.description}" for one in each)

    def markdown(self) -> str:
        """Both tables, and how they were made."""
        text = f"# Bench\n\n{self.explanation()}\n\n{_markdown(self.table())}\n{self.legend()}.\n"
        if rows := self.differences():
            text += (
                f"\n## Less {self.title(self.config.baseline)}\n\nDifference, its 95 % interval (paired bootstrap "
                f"over prompts and training seeds), and what it says.\n\n{_markdown(rows)}"
            )
        if self.reasons:
            text += "\n## Not available\n\n"
            text += "".join(f"- {METHODS[name].title}: {reason}.\n" for name, reason in self.reasons.items())
        return f"{text}\n## How to repeat it\n\n```bash\n{self.command}\n```\n"

    def show(self, console: "Console") -> None:
        """Both tables at a terminal, one under the other; intervals are in the file."""
        from rich.table import Table

        baseline = f"Less {self.title(self.config.baseline)} (~: not distinguishable at 95 %)"
        titles = {"Held-out prompts, mean ± standard deviation over seeds": self.table()}
        titles |= {baseline: self.differences(with_intervals=False)}
        for title, rows in titles.items():
            if not rows:
                continue
            table = Table(title=title, title_justify="left")
            for number, name in enumerate(rows[0]):
                table.add_column(name, justify="right" if number else "left")
            for row in rows[1:]:
                table.add_row(*row)
            console.print(table, highlight=False)
        for name, reason in self.reasons.items():
            console.print(f"{METHODS[name].title} is not available: {reason}.", highlight=False)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def add_to_store(path: str, results: Results) -> int:
    r"""
    Add a bench to a store of results, as one run whose seeds are those of training.

    Args:
        path (`str`):
            File of the store.
        results ([`Results`]):
            The bench.

    Returns:
        `int`: number of the run.
    """
    from trl_kd.evaluation.store import ModelEntry, ResultStore
    from trl_kd.scripts.bench_cells import read_samples

    config, models = results.config, []
    for name, cells in results.cells.items():
        facts = cells[0]["model"]
        weights = hashlib.sha256("".join(cell["model"]["weights"] for cell in cells).encode()).hexdigest()
        models.append(
            ModelEntry(
                name=results.title(name),
                role=name if name in TITLES else "student",
                source=config.teacher if name == TEACHER else config.student,
                weights=weights,
                tokenizer=facts["tokenizer"],
                parameters=facts["parameters"],
            )
        )
    settings = {name: cells[0]["settings"] for name, cells in results.cells.items()}
    first = results.cells[TEACHER][0]["settings"]
    digest = first["test rows"]
    with ResultStore(path).begin("bench", "bench", settings, digest, config.data, models, first["versions"]) as run:
        for name, cells in results.cells.items():
            title = results.title(name)
            # One model has one draw, whichever seed others were trained with
            by_seed = zip(config.seeds, cells * len(config.seeds) if name in TITLES else cells, strict=False)
            for seed, cell in by_seed:
                samples = read_samples(cell)
                run.add_samples(title, seed, samples)
                averages = {metric: _average(samples, metric) for metric in samples[0].values}
                run.add_results(title, seed, averages)
            if cells[0]["training"] is not None:
                run.set_details(title, "training", cells[0]["training"]["log"])
        run.finish()
        return run.id


def _average(samples: Sequence[Any], metric: str) -> float:
    values, weights = zip(*(sample.values.get(metric, (0.0, 0.0)) for sample in samples), strict=True)
    return float(np.average(values, weights=weights)) if sum(weights) else 0.0
