"""
One page of what training and evaluation found, to look at in a browser.

```bash
trl-kd report Qwen2.5-0.5B-AMM --store trl_kd_results.sqlite --output report.html
```
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl_kd.evaluation import Comparison, ResultStore, RunInfo, Sample


DESCRIPTION = """\
Write one self-contained HTML page on models and how they were trained: a summary in words, the table with error bars,
training curves, the divergence from the teacher by position, cost against quality, and responses side by side.

A RUN is the number or name of an evaluation in the store, or a folder that a training wrote, with the latest
evaluation of the model in it. Several evaluations are joined if they asked the same questions in the same way.
"""


def find_run(store: "ResultStore", run: str) -> int | None:
    """Number of the evaluation that is meant; `None` for a training that was not evaluated."""
    from trl_kd.evaluation.models import weights_digest

    folder = Path(run)
    if not folder.is_dir():
        return store.run(run).id
    digest = weights_digest(run)
    for info in reversed(store.runs() if digest != "unknown" else []):
        if info.finished is not None and info.kind == "eval" and any(m.weights == digest for m in info.models):
            return info.id
    return None


def training_alone(folder: str) -> "Comparison":
    """What can be shown of a training without an evaluation."""
    from trl_kd.evaluation.comparison import ComparedModel, Comparison, training_log

    log = training_log(folder)
    if log is None:
        raise ValueError(
            f"`{folder}` holds no `trainer_state.json`, and no evaluation of the model in it is in the store. Run "
            "`trl-kd eval`, or name a folder that a training wrote (with `save_strategy` other than 'no')."
        )
    model = ComparedModel(Path(folder).name, "student", folder, None, None, "", {}, training=log)
    return Comparison(0, model.name, "not evaluated yet", "", {}, {}, [], [model], 0, [])


def check_same_measure(info: "RunInfo", first: "RunInfo") -> None:
    """Students of two evaluations stand in one table only if both measured against the same models."""
    known = {model.role: model.weights for model in first.models}
    others = {model.role: model.weights for model in info.models}
    if any(known.get(role, others.get(role)) != others.get(role, known.get(role)) for role in ("teacher", "before")):
        raise ValueError(
            f"Runs {first.id} and {info.id} have another teacher or another student before distillation, so their "
            "distances and changes mean different things. Evaluate all students in one `trl-kd eval`."
        )


def collect(store: "ResultStore | None", args: Namespace) -> "tuple[Comparison, dict[str, list[Sample]]]":
    """The models of the first evaluation and the students of the others, with their responses to the first seed."""
    from trl_kd.evaluation import compare_run
    from trl_kd.evaluation.comparison import check_same_questions

    found = {run: None if store is None else find_run(store, run) for run in args.run}
    if None in found.values():
        if len(found) > 1:
            missing = [run for run, number in found.items() if number is None]
            raise ValueError(
                f"{missing} were not evaluated, so they cannot be compared with the others. Evaluate all of them by "
                "`trl-kd eval`."
            )
        return training_alone(args.run[0]), {}
    first, *others = dict.fromkeys(found.values())
    comparison = compare_run(store, first, baseline=args.baseline)
    seed = comparison.seeds[0]
    samples = {model.name: store.samples(first, model.name, seed) for model in comparison.models}
    for number in others:
        check_same_questions(store.run(number), store.run(first))
        check_same_measure(store.run(number), store.run(first))
        for model in compare_run(store, number).models:
            is_known = any(model.weights == known.weights for known in comparison.models)
            if model.role in ("student", "other") and not is_known:
                answers = store.samples(number, model.name, seed)
                model.name = f"{model.name} (run {number})" if model.name in samples else model.name
                samples[model.name] = answers
                comparison.models.append(model)
    return comparison, samples


def main(args: Namespace) -> None:
    """Write the page, and what else is wanted."""
    from trl_kd.evaluation import ResultStore, update_model_card, write_report
    from trl_kd.evaluation.figures import figures
    from trl_kd.plots import write_figures

    store = ResultStore(args.store, create=False) if Path(args.store).exists() else None
    if store is None and not all(Path(run).is_dir() for run in args.run):
        raise ValueError(
            f"There is no store `{args.store}`, so an evaluation cannot be found in it. Run `trl-kd eval` first, or "
            "name the store by `--store`."
        )
    comparison, samples = collect(store, args)
    write_report(comparison, samples, args.output, max_prompts=args.max_prompts)
    print(f"Report: {Path(args.output).absolute()}")
    if args.figures is not None:
        for file in write_figures(figures(comparison), args.figures):
            print(f"Figure: {file}")
    for model in comparison.models if args.model_card else ():
        if model.role == "student" and Path(model.source).is_dir():
            update_model_card(model.source, comparison, model.name)
            print(f"Model card: {Path(model.source) / 'README.md'}")


def make_parser(prog: str | None = None) -> ArgumentParser:
    """Parser of the options of `trl-kd report`."""
    from trl_kd.scripts.arguments import HelpFormatter

    parser = ArgumentParser(prog=prog, description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("run", nargs="+", metavar="RUN", help="evaluation in the store, or folder of a training")
    parser.add_argument("--store", default="trl_kd_results.sqlite", help="file of the results")
    parser.add_argument("--output", default="report.html", help="file to write")
    parser.add_argument("--baseline", help="model that changes are measured against (default: the one `before`)")
    parser.add_argument("--max_prompts", type=int, default=100, help="prompts that are shown side by side")
    parser.add_argument("--figures", help="folder for the figures as PNG (the extra `plots`)")
    parser.add_argument("--model_card", action="store_true", help="put the table into README.md of each student")
    return parser


def run(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the command line and write the report."""
    parser = make_parser(prog)
    args = parser.parse_args(arguments)
    try:
        main(args)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    run()
