"""What an evaluation found, with error bars: the one source of tables, report and model card."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_kd.evaluation.bootstrap import Estimate, difference, estimate, verdict
from trl_kd.evaluation.formats import count, number, with_error
from trl_kd.evaluation.measures import TEACHER_MEASURES, measure_of
from trl_kd.evaluation.store import ResultStore, RunInfo


if TYPE_CHECKING:
    from rich.table import Table


# The interval of the imitation gap is that of this measure, against the teacher's
_DERIVED = {"imitation_gap": "own_teacher_nll"}
SAME = "not distinguishable"


@dataclass(frozen=True)
class Change:
    r"""
    One measure of a model against another model's, prompt by prompt.

    Args:
        metric (`str`):
            Name of the measure.
        against (`str`):
            Name of the other model.
        estimate ([`Estimate`]):
            The difference.
        relative (`float`, *optional*):
            The difference as a share of the other's value; `None` where that is 0.
        verdict (`str`):
            `"better"`, `"worse"`, `"not distinguishable at 95 %"`, or `"higher"` and `"lower"` where neither is good.
    """

    metric: str
    against: str
    estimate: Estimate
    relative: float | None
    verdict: str


@dataclass
class ComparedModel:
    r"""
    What is known of one model.

    Args:
        name (`str`):
            Its name.
        role (`str`):
            `"teacher"`, `"before"`, `"student"` or `"other"`.
        source (`str`):
            Folder or Hub name.
        parameters (`int`, *optional*):
            Number of parameters.
        size_on_disk (`int`, *optional*):
            Bytes of its weight files.
        weights (`str`):
            Digest of its weights.
        estimates (`dict[str, Estimate]`):
            Its measures.
        changes (`dict[str, Change]`):
            Its measures against the baseline.
        to_teacher (`dict[str, Change]`):
            Its measures against the teacher.
        cost, by_position, judge, harness (`dict`, *optional*):
            What was measured beside.
        training (`list[dict]`, *optional*):
            The Trainer's log, if the model's folder has one.
    """

    name: str
    role: str
    source: str
    parameters: int | None
    size_on_disk: int | None
    weights: str
    estimates: dict[str, Estimate]
    changes: dict[str, Change] = field(default_factory=dict)
    to_teacher: dict[str, Change] = field(default_factory=dict)
    cost: dict[str, Any] | None = None
    by_position: dict[str, Any] | None = None
    judge: dict[str, Any] | None = None
    harness: dict[str, Any] | None = None
    training: list[dict[str, Any]] | None = None


@dataclass
class Comparison:
    r"""
    An evaluation, ready to be shown.

    Args:
        run_id (`int`):
            Number of the run in the store.
        title (`str`):
            Its name.
        dataset (`str`):
            Name of the dataset.
        created (`str`):
            When it began, ISO 8601.
        settings (`dict[str, Any]`):
            Those of the suite.
        versions (`dict[str, str]`):
            Of the libraries.
        metrics (`list[str]`):
            Measures to show, the main one first.
        models (`list[ComparedModel]`):
            The models, the teacher first.
        num_prompts (`int`):
            Prompts that were answered.
        seeds (`list[int]`):
            Seeds of the generation.
    """

    run_id: int
    title: str
    dataset: str
    created: str
    settings: dict[str, Any]
    versions: dict[str, str]
    metrics: list[str]
    models: list[ComparedModel]
    num_prompts: int
    seeds: list[int]

    @property
    def teacher(self) -> ComparedModel | None:
        """The teacher, if there is one."""
        return next((model for model in self.models if model.role == "teacher"), None)

    def _rows(self) -> list[list[str]]:
        """Cells of the table: a row for each measure, a column for each model, and one for each model's change."""
        rows = []
        for name in self.metrics:
            measure = measure_of(name)
            better = {True: " ↑", False: " ↓", None: ""}[measure.higher_is_better]
            unit = f" ({measure.unit})" if measure.unit else ""
            row = [f"{measure.title}{unit}{better}"]
            for model in self.models:
                found = model.estimates.get(name)
                row.append("" if found is None else with_error(found, measure.digits))
                if model.changes:
                    row.append(_change_cell(model.changes.get(name), measure.digits))
            rows.append(row)
        if any(model.parameters for model in self.models):
            row = ["parameters"]
            for model in self.models:
                row += [count(model.parameters)] + ([""] if model.changes else [])
            rows.append(row)
        return rows

    def _titles(self) -> list[str]:
        titles = [""]
        for model in self.models:
            titles.append(model.name)
            if model.changes:
                titles.append(f"change from {next(iter(model.changes.values())).against}")
        return titles

    def table(self) -> "Table":
        """Table for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        caption = f"{self.num_prompts} prompts, {len(self.seeds)} seeds; ± half of the 95 % interval; ↑ more is better"
        table = Table(title=escape(f"{self.title}: {self.dataset}"), caption=caption, title_justify="left")
        for index, title in enumerate(self._titles()):
            table.add_column(escape(title), justify="right" if index else "left")
        for row in self._rows():
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        """The same table in Markdown."""
        titles = self._titles()
        lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *self._rows()]
        return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)

    def sentences(self) -> list[str]:
        """The summary in words: what each student gained and lost, and against what."""
        said = [sentence for model in self.models if model.role == "student" for sentence in self._about(model)]
        names = " and ".join(model.name for model in self.models)
        if not self.metrics:
            return [f"{names}: trained, and not evaluated yet."]
        return said or [f"{names}: no student to speak of."]

    def _about(self, model: ComparedModel) -> list[str]:
        said = [self._main_measure(model)] if self.metrics and self.metrics[0] in model.estimates else []
        if model.changes:
            said.append(self._changes_in_words(model))
        if model.to_teacher and all(SAME in change.verdict for change in model.to_teacher.values()):
            said.append(f"{model.name} is not distinguishable from the teacher at 95 % by any of these measures.")
        if self.teacher is not None and model.parameters and self.teacher.parameters:
            share = 100 * model.parameters / self.teacher.parameters
            said.append(f"{model.name} has {count(model.parameters)} parameters, {share:.3g} % of the teacher's.")
        return said

    def _main_measure(self, model: ComparedModel) -> str:
        """The main measure of a student, of the baseline and of the teacher."""
        main = self.metrics[0]
        measure = measure_of(main)
        text = f"{model.name} has {measure.title} {with_error(model.estimates[main], measure.digits)}"
        change = model.changes.get(main)
        if change is not None:
            before = model.estimates[main].value - change.estimate.value
            text += f" where {change.against} has {number(before, measure.digits)}: {change.verdict}"
        if self.teacher is not None and main in self.teacher.estimates:
            text += f"; the teacher has {with_error(self.teacher.estimates[main], measure.digits)}"
        return f"{text}."

    def _changes_in_words(self, model: ComparedModel) -> str:
        """What became better, worse and neither."""
        groups: dict[str, list[str]] = {}
        for name in self.metrics:
            if (change := model.changes.get(name)) is None:
                continue
            measure, found = measure_of(name), change.estimate
            text = measure.title
            if SAME not in change.verdict:
                sign = "+" if found.value > 0 else ""
                text += f" ({sign}{number(found.value, measure.digits)})"
            groups.setdefault(change.verdict, []).append(text)
        against = next(iter(model.changes.values())).against
        parts = [f"{says}: {', '.join(names)}" for says, names in sorted(groups.items())]
        return f"{model.name} against {against}. {'; '.join(parts)[:1].upper()}{'; '.join(parts)[1:]}."


def _change_cell(change: Change | None, digits: int) -> str:
    if change is None:
        return ""
    words = "same" if SAME in change.verdict else change.verdict
    return f"{with_error(change.estimate, digits, sign=True)} {words}"


class _Measured:
    """The values of one run, per prompt and seed."""

    def __init__(self, store: ResultStore, info: RunInfo):
        self.store, self.info = store, info
        self.teacher = next((model.name for model in info.models if model.role == "teacher"), None)

    def values(self, model: str, metric: str) -> Any:
        return self.store.values(self.info.id, model, _DERIVED.get(metric, metric))

    def estimate(self, model: str, metric: str) -> Estimate | None:
        found = self.values(model, metric)
        if found is None or not found[1].any():
            return None
        if metric in _DERIVED:
            return difference(found, self.values(self.teacher, metric), seed_effect=False)
        # Seeds of a generation only draw texts
        return estimate(*found, seed_effect=False)


def _changes(
    one: _Measured, model: str, other: _Measured, against: str, metrics: Sequence[str], title: str | None = None
) -> dict[str, Change]:
    changes = {}
    for metric in metrics:
        left, right = one.values(model, metric), other.values(against, metric)
        if left is None or right is None or not (left[1].any() and right[1].any()):
            continue
        if not _is_comparable(one, model, other, against, metric):
            continue
        found = difference(left, right, seed_effect=False)
        base = other.estimate(against, metric).value
        changes[metric] = Change(
            metric,
            title or against,
            found,
            found.value / abs(base) if base else None,
            verdict(found, measure_of(metric).higher_is_better),
        )
    return changes


def _is_comparable(one: _Measured, model: str, other: _Measured, against: str, metric: str) -> bool:
    """Counts in tokens say nothing about models that cut texts otherwise, and distances none to two teachers."""
    if metric in TEACHER_MEASURES and metric != "own_entropy":
        teachers = [{entry.weights for entry in run.info.models if entry.role == "teacher"} for run in (one, other)]
        return teachers[0] == teachers[1]
    if metric not in ("nll", "length", "own_entropy"):
        return True
    tokenizers = [
        next(entry.tokenizer for entry in run.info.models if entry.name == name)
        for run, name in ((one, model), (other, against))
    ]
    return tokenizers[0] == tokenizers[1]


def training_log(source: str) -> list[dict[str, Any]] | None:
    """The Trainer's log of the run that made a model: in its folder, or in the folder's last checkpoint."""
    folder = Path(source)
    files = [folder / "trainer_state.json"]
    if folder.is_dir():
        checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        checkpoints.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
        files += [checkpoint / "trainer_state.json" for checkpoint in checkpoints[:1]]
    for file in files:
        if file.is_file():
            return json.loads(file.read_text())["log_history"]
    return None


def check_same_questions(info: RunInfo, other: RunInfo) -> None:
    """Two runs can be compared if they asked the same questions in the same way."""
    ignored = ("metrics", "main_metric", "name", "loading")
    known = sorted((info.settings.keys() | other.settings.keys()) - set(ignored))
    differing = [key for key in known if info.settings.get(key) != other.settings.get(key)]
    if info.data != other.data or differing:
        what = f"settings ({', '.join(differing)})" if info.data == other.data else "prompts or references"
        raise ValueError(
            f"Run {info.id} and run {other.id} have different {what}, so their difference would say nothing about the "
            "models. Evaluate both on the same data with the same settings."
        )


def finished_evaluation(info: RunInfo) -> RunInfo:
    """The run, if it is a whole evaluation."""
    if info.kind != "eval":
        raise ValueError(
            f"Run {info.id} is a {info.kind}, whose table is made by `trl-kd {info.kind}`. Name an evaluation."
        )
    if info.finished is None:
        raise ValueError(
            f"Run {info.id} is not finished, so its models would be compared on different prompts. Give its "
            "`trl-kd eval` again, which goes on where it was cut off."
        )
    return info


def compare_run(
    store: ResultStore,
    which: int | str = "latest",
    *,
    baseline: str | None = None,
    against: tuple[ResultStore, int | str] | None = None,
    only_main: bool = False,
) -> Comparison:
    r"""
    Estimates, changes and verdicts of one run.

    Args:
        store ([`ResultStore`]):
            The store.
        which (`int` or `str`, *optional*, defaults to `"latest"`):
            Number or name of the run.
        baseline (`str`, *optional*):
            Model that changes are measured against. Defaults to the one with the role `"before"`, if there is one.
        against (`tuple[ResultStore, int or str]`, *optional*):
            A run that changes are measured against instead: each model against the model of the same name there; else
            against its only student.
        only_main (`bool`, *optional*, defaults to `False`):
            Whether to look at the main measure alone, which takes a fraction of the time.

    Returns:
        [`Comparison`]

    Raises:
        ValueError: If there is no such run or model, a run is no finished evaluation, or the other run had other
            prompts or settings.
    """
    info = finished_evaluation(store.run(which))
    run = _Measured(store, info)
    metrics = _shown(info)[: 1 if only_main else None]
    other = None
    if against is not None:
        other = _Measured(against[0], finished_evaluation(against[0].run(against[1])))
        check_same_questions(info, other.info)
    if baseline is None:
        baseline = next((model.name for model in info.models if model.role == "before"), None)
    elif baseline not in (names := [model.name for model in info.models]):
        raise ValueError(f"There is no model '{baseline}' in run {info.id}: it has {names}. Name one of these.")
    models = []
    for entry in info.models:
        estimates = {metric: run.estimate(entry.name, metric) for metric in metrics}
        details = {key: store.details(info.id, entry.name, key) for key in ("cost", "by_position", "judge", "harness")}
        model = ComparedModel(
            *(entry.name, entry.role, entry.source, entry.parameters, entry.size_on_disk, entry.weights),
            estimates={metric: found for metric, found in estimates.items() if found is not None},
            training=training_log(entry.source),
            **details,
        )
        if entry.role != "teacher":
            model.changes = _against(run, entry.name, other, baseline, metrics)
            if run.teacher is not None:
                model.to_teacher = _changes(run, entry.name, run, run.teacher, metrics)
        models.append(model)
    samples = store.samples(info.id, info.models[0].name, info.seeds[0])
    shown = [metric for metric in metrics if any(metric in model.estimates for model in models)]
    return Comparison(
        *(info.id, info.name, info.dataset, info.created, info.settings, info.versions),
        metrics=shown,
        models=models,
        num_prompts=len(samples),
        seeds=list(info.seeds),
    )


def _against(
    run: _Measured, name: str, other: _Measured | None, baseline: str | None, metrics: Sequence[str]
) -> dict[str, Change]:
    """Changes of one model against its counterpart in another run, or against the baseline of its own."""
    if other is None:
        return _changes(run, name, run, baseline, metrics) if baseline not in (None, name) else {}
    names = [model.name for model in other.info.models]
    students = [model.name for model in other.info.models if model.role == "student"]
    if name not in names and len(students) != 1:
        return {}
    counterpart = name if name in names else students[0]
    return _changes(run, name, other, counterpart, metrics, f"{counterpart} in run {other.info.id}")


def _shown(info: RunInfo) -> list[str]:
    """The suite's measures, the main one first."""
    metrics = list(info.settings["metrics"])
    main = info.settings.get("main_metric")
    return ([main] if main else []) + [metric for metric in metrics if metric != main]
