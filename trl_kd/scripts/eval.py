"""
Compare a teacher, a student before distillation and students after it, and keep what was found.

```bash
trl-kd eval --teacher Qwen/Qwen2.5-1.5B-Instruct --before Qwen/Qwen2.5-0.5B-Instruct --students out \
    --template instruction --dataset_name test.jsonl --cost true --report report.html
```
"""

import json
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl import TrlParser

    from trl_kd.evaluation import Comparison, EvalModel, Evaluation, ResultStore, Suite


DESCRIPTION = """\
Compare a teacher, a student before distillation and students after it, on a dataset of prompts.

Models are folders (of a model, a checkpoint or an adapter) or names on the Hub, each with a name of its own in tables
if it is written name=path. Every value is kept in the store, prompt by prompt: started again with the same options, an
evaluation that was cut off goes on where it was. --history lists what the store has.

With --fail_if, the command exits with status 1 if a student has become worse: "rouge_l < -0.5%" is a change of Rouge-L
by less than -0.5 %, relative, against --before, or against the run --against; "nll > 0.02" one in nats. A change that
is not distinguishable from none at 95 % never fails. `template` stands for the conditions of the template.
"""


@dataclass
class EvalArguments:
    r"""
    Arguments of `trl-kd eval`.

    Args:
        teacher (`str`, *optional*):
            The teacher: folder or Hub name, as `path` or `name=path`.
        before (`str`, *optional*):
            The student before distillation, which changes are measured against.
        students (`list[str]`, *optional*, defaults to `[]`):
            Students after distillation.
        dataset_name (`str`, *optional*):
            Hub name, local file or folder with the prompts.
        dataset_config (`str`, *optional*):
            Configuration of a dataset on the Hub.
        dataset_split (`str`, *optional*):
            Split to use. Defaults to `test`, or to the only one.
        template (`str`, *optional*):
            Test suite: instruction, summarisation, translation, arithmetic, story, or a YAML file of your own.
            Without one, the dataset holds its prompts already.
        num_prompts (`int`, *optional*):
            How many of the first prompts to take. Defaults to all.
        metrics (`list[str]`, *optional*):
            What is measured, in place of the template's metrics.
        seeds (`list[int]`, *optional*):
            Seeds of the generation, in place of the template's.
        max_completion_length (`int`, *optional*):
            Length at which completions are cut, in tokens, in place of the template's.
        temperature (`float`, *optional*):
            Sampling temperature, in place of the template's. 0 is greedy.
        top_p (`float`, *optional*):
            Probability mass of the tokens sampled from, in place of the template's.
        chat (`bool`, *optional*):
            Whether prompts of text become messages in the chat template of each model.
        batch_size (`int`, *optional*, defaults to `16`):
            Prompts per batch. It decides which completions share a seed, so an evaluation goes on only with the same.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Arguments of `from_pretrained` for all models, as JSON.
        run_name (`str`, *optional*):
            Name of this evaluation in the store. Defaults to the template's.
        store (`str`, *optional*, defaults to `"trl_kd_results.sqlite"`):
            File of the results.
        cost (`bool`, *optional*, defaults to `False`):
            Whether to measure what each model costs to serve on this machine.
        price_per_hour (`float`, *optional*):
            Price of this machine, for a price per million tokens.
        harness_tasks (`list[str]`, *optional*, defaults to `[]`):
            Tasks of lm-evaluation-harness to run too (the extra `harness`).
        harness_limit (`int`, *optional*):
            Examples per task.
        judge_url (`str`, *optional*):
            OpenAI-compatible endpoint that prefers one of two responses; the key is read from OPENAI_API_KEY.
        judge_model (`str`, *optional*):
            Name of the judging model there.
        history (`bool`, *optional*, defaults to `False`):
            List what the store has, and measure nothing.
        against (`str`, *optional*):
            Number or name of an earlier run that changes are measured against.
        fail_if (`list[str]`, *optional*, defaults to `[]`):
            Changes that make the command exit with status 1; `template` for those of the template.
        report (`str`, *optional*):
            File of a report to write, `.html`.
        model_card (`bool`, *optional*, defaults to `False`):
            Whether to put the table into the README.md of each student's folder.
    """

    teacher: str | None = field(
        default=None, metadata={"help": "The teacher: folder or Hub name, as `path` or `name=path`."}
    )
    before: str | None = field(
        default=None, metadata={"help": "The student before distillation, which changes are measured against."}
    )
    students: list[str] = field(default_factory=list, metadata={"help": "Students after distillation."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name, local file or folder with the prompts."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split to use. Defaults to `test`, or to the only one."}
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": "Test suite: instruction, summarisation, translation, arithmetic, story, or a YAML file of your "
            "own. Without one, the dataset holds its prompts already."
        },
    )
    num_prompts: int | None = field(
        default=None, metadata={"help": "How many of the first prompts to take. Defaults to all."}
    )
    metrics: list[str] | None = field(
        default=None, metadata={"help": "What is measured, in place of the template's metrics."}
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Seeds of the generation, in place of the template's."}
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={"help": "Length at which completions are cut, in tokens, in place of the template's."},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Sampling temperature, in place of the template's. 0 is greedy."}
    )
    top_p: float | None = field(
        default=None,
        metadata={"help": "Probability mass of the tokens sampled from, in place of the template's."},
    )
    chat: bool | None = field(
        default=None,
        metadata={"help": "Whether prompts of text become messages in the chat template of each model."},
    )
    batch_size: int = field(
        default=16,
        metadata={
            "help": "Prompts per batch. It decides which completions share a seed, so an evaluation goes on only with "
            "the same."
        },
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of `from_pretrained` for all models, as JSON."}
    )
    run_name: str | None = field(
        default=None, metadata={"help": "Name of this evaluation in the store. Defaults to the template's."}
    )
    store: str = field(default="trl_kd_results.sqlite", metadata={"help": "File of the results."})
    cost: bool = field(
        default=False, metadata={"help": "Whether to measure what each model costs to serve on this machine."}
    )
    price_per_hour: float | None = field(
        default=None, metadata={"help": "Price of this machine, for a price per million tokens."}
    )
    harness_tasks: list[str] = field(
        default_factory=list, metadata={"help": "Tasks of lm-evaluation-harness to run too (the extra `harness`)."}
    )
    harness_limit: int | None = field(default=None, metadata={"help": "Examples per task."})
    judge_url: str | None = field(
        default=None,
        metadata={
            "help": "OpenAI-compatible endpoint that prefers one of two responses; the key is read from "
            "OPENAI_API_KEY."
        },
    )
    judge_model: str | None = field(default=None, metadata={"help": "Name of the judging model there."})
    history: bool = field(default=False, metadata={"help": "List what the store has, and measure nothing."})
    against: str | None = field(
        default=None, metadata={"help": "Number or name of an earlier run that changes are measured against."}
    )
    fail_if: list[str] = field(
        default_factory=list,
        metadata={"help": "Changes that make the command exit with status 1; `template` for those of the template."},
    )
    report: str | None = field(default=None, metadata={"help": "File of a report to write, `.html`."})
    model_card: bool = field(
        default=False, metadata={"help": "Whether to put the table into the README.md of each student's folder."}
    )

    def __post_init__(self):
        if isinstance(self.model_init_kwargs, str):
            self.model_init_kwargs = json.loads(self.model_init_kwargs)


def check_arguments(args: EvalArguments) -> None:
    """Refuse what cannot work before a model is loaded."""
    if args.history:
        return
    if args.dataset_name is None:
        raise ValueError("`dataset_name` is not set, so there are no prompts. Pass `--dataset_name`.")
    if not (args.teacher or args.before or args.students):
        raise ValueError("There is no model to evaluate. Pass `--students`, `--before` or `--teacher`.")
    if (args.judge_url is None) != (args.judge_model is None):
        raise ValueError("A judge is an endpoint and a model there. Pass both `--judge_url` and `--judge_model`.")
    if args.judge_url is not None and not (args.before or args.teacher):
        raise ValueError(
            "A judge compares students with `before`, or with the teacher, but there is neither. Pass `--before`."
        )
    if args.price_per_hour is not None and args.price_per_hour < 0:
        raise ValueError(f"`price_per_hour` is {args.price_per_hour}. Nobody is paid for it: set it to 0 or more.")
    if args.harness_tasks and find_spec("lm_eval") is None:
        raise ValueError(
            "`harness_tasks` need lm-evaluation-harness, which is not installed. Install the extra: "
            "`pip install trl_kd[harness]`."
        )
    if args.fail_if and not args.students:
        raise ValueError(f"`fail_if` is {args.fail_if}, but there is no student to judge. Pass `--students`.")
    if args.fail_if and args.before is None and args.against is None:
        raise ValueError(
            f"`fail_if` is {args.fail_if}, but there is nothing that changes could be measured against. Pass "
            "`--before`, or an earlier run by `--against`."
        )
    if args.report is not None and not Path(args.report).absolute().parent.is_dir():
        raise ValueError(f"`report` is '{args.report}', whose folder does not exist. Make it, or name another.")


def named(text: str) -> tuple[str, str]:
    """Name and path of `name=path`; the last part of a path alone is its name."""
    name, separator, path = text.partition("=")
    if separator and "/" not in name:
        return name, path
    return Path(text.rstrip("/")).name or text, text


def find_models(args: EvalArguments) -> "list[EvalModel]":
    """The models of the command line."""
    from trl_kd.evaluation import EvalModel

    given = [("teacher", args.teacher), ("before", args.before), *(("student", path) for path in args.students)]
    kwargs = dict(args.model_init_kwargs or {})
    return [EvalModel(*named(path), role=role, init_kwargs=kwargs) for role, path in given if path is not None]


def find_suite(args: EvalArguments) -> "Suite":
    """The template with the changes of the command line."""
    from trl_kd.evaluation import load_suite, plain_suite

    names = ("metrics", "seeds", "max_completion_length", "temperature", "top_p", "chat")
    changes = {name: getattr(args, name) for name in names}
    if args.metrics is not None:
        changes["main_metric"] = args.metrics[0]
    if args.temperature == 0.0 and args.seeds is None:
        changes["seeds"] = [0]
    return plain_suite(changes) if args.template is None else load_suite(args.template, changes)


def find_conditions(args: EvalArguments, suite: "Suite") -> list[Any]:
    """What counts as a regression; metrics that are not measured are refused here, before any work."""
    from trl_kd.evaluation import parse_condition

    texts = [text for given in args.fail_if for text in (suite.fail_if if given == "template" else [given])]
    conditions = [parse_condition(text) for text in texts]
    for condition in conditions:
        if condition.metric not in suite.metrics:
            raise ValueError(
                f"`fail_if` has '{condition}', but `{condition.metric}` is not measured: the metrics are "
                f"{', '.join(suite.metrics)}. Name one of these, or add it by `--metrics`."
            )
    if args.fail_if and not conditions:
        raise ValueError(
            "`fail_if` is `template`, but the template has no conditions, so nothing could ever fail. Write some "
            "under `fail_if` in it, or on the command line."
        )
    return conditions


def check_conditions(conditions: Sequence[Any], task: "Evaluation") -> None:
    """Refuse conditions on what this data and these models do not allow to measure."""
    measurable = task.measurable()
    for condition in conditions:
        if condition.metric not in measurable:
            raise ValueError(
                f"`fail_if` has '{condition}', but `{condition.metric}` cannot be measured here: it needs references "
                "or a teacher that there are not. Give them, or leave the condition out."
            )


def find_dataset(args: EvalArguments) -> Any:
    """The split of the dataset that is evaluated on."""
    from trl_kd.scripts.arguments import load_splits, select_split

    splits = load_splits(args.dataset_name, config=args.dataset_config)
    split = args.dataset_split or ("test" if "test" in splits or len(splits) > 1 else next(iter(splits)))
    return select_split(splits, split, "dataset_split")


def violated(comparison: "Comparison", conditions: Sequence[Any]) -> list[str]:
    """Regressions, in words."""
    from trl_kd.evaluation.formats import with_error
    from trl_kd.evaluation.measures import measure_of

    found = []
    for model in comparison.models:
        for condition in conditions if model.role == "student" else ():
            change = model.changes.get(condition.metric)
            if change is None:
                raise ValueError(
                    f"`fail_if` has '{condition}', but there is no change in `{condition.metric}` of {model.name}: it "
                    "was not measured there, or not where changes are measured against. Give what it needs "
                    "(references, a teacher, the same tokenizer), or leave the condition out."
                )
            base = model.estimates[condition.metric].value - change.estimate.value
            if condition.violated(base, change.estimate):
                says = with_error(change.estimate, measure_of(condition.metric).digits, sign=True)
                found.append(f"{model.name} against {change.against}: {condition.metric} {says} ({condition})")
    return found


def show_history(path: str) -> None:
    """All evaluations of a store, newest last, with their main measure."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from trl_kd.evaluation import ResultStore, compare_run
    from trl_kd.evaluation.formats import with_error
    from trl_kd.evaluation.measures import measure_of

    store, table = ResultStore(path, create=False), Table(title=f"Evaluations in {path}", title_justify="left")
    for title in ("run", "date", "name", "dataset", "model", "weights", "main metric", "value"):
        table.add_column(title, justify="right" if title == "value" else "left")
    for info in store.runs():
        start = (str(info.id), info.created[:16], info.name, info.dataset)
        if info.kind != "eval" or info.finished is None:
            table.add_row(*map(escape, (*start, "(not finished)" if info.kind == "eval" else f"({info.kind})")))
            continue
        comparison = compare_run(store, info.id, only_main=True)
        for model in comparison.models:
            for name, value in model.estimates.items():
                measure = measure_of(name)
                cells = (model.name, model.weights[:10], measure.title, with_error(value, measure.digits))
                table.add_row(*map(escape, (*start, *cells)))
    Console(width=140).print(table)


def main(args: EvalArguments, command: str | None = None) -> int:
    """Evaluate, compare, show and keep; the exit status says whether a condition was violated."""
    import transformers
    from rich.console import Console

    from trl_kd.evaluation import Evaluation, Judge, ResultStore, compare_run, read_rows
    from trl_kd.evaluation.comparison import check_same_questions, finished_evaluation
    from trl_kd.scripts.eval_details import add_costs, add_harness, add_judgement

    if args.history:
        show_history(args.store)
        return 0
    transformers.utils.logging.disable_progress_bar()  # one bar is enough
    suite = find_suite(args)
    conditions = find_conditions(args, suite)
    judge = None if args.judge_url is None else Judge(args.judge_url, args.judge_model)
    store = ResultStore(args.store)
    other = None if args.against is None else finished_evaluation(store.run(args.against))
    rows = read_rows(find_dataset(args), suite, args.num_prompts)
    task = Evaluation(find_models(args), rows, suite, Path(args.dataset_name).name, args.run_name, args.batch_size)
    check_conditions(conditions, task)
    with task.begin(store) as run:
        if other is not None:
            check_same_questions(store.run(run.id), other)
        task.run(run)
        if args.cost:
            add_costs(task, run, store, args.price_per_hour)
        if args.harness_tasks:
            add_harness(task, run, store, args.harness_tasks, args.harness_limit)
        if judge is not None:
            add_judgement(task, run, store, judge)
        run.finish()
    comparison = compare_run(store, run.id, against=None if other is None else (store, other.id))
    console = Console(width=None if Console().is_terminal else 140)
    console.print(comparison.table())
    for sentence in comparison.sentences():
        console.print(sentence, highlight=False, markup=False)
    console.print(f"Run {run.id} in {args.store}.", highlight=False, markup=False)
    share(args, task, comparison, store, command)
    regressions = violated(comparison, conditions)
    for regression in regressions:
        console.print(f"Regression: {regression}", style="bold red", highlight=False, markup=False)
    return 1 if regressions else 0


def share(
    args: EvalArguments, task: "Evaluation", comparison: "Comparison", store: "ResultStore", command: str | None
) -> None:
    """The report and the model cards, if they are wanted."""
    from trl_kd.evaluation import update_model_card, write_report

    if args.report is not None:
        seed = comparison.seeds[0]
        samples = {model.name: store.samples(comparison.run_id, model.name, seed) for model in comparison.models}
        write_report(comparison, samples, args.report, command=command)
        print(f"Report: {Path(args.report).absolute()}")
    for model in task.models if args.model_card else ():
        if model.role == "student" and Path(model.model).is_dir():
            update_model_card(model.model, comparison, model.name)
            print(f"Model card: {Path(model.model) / 'README.md'}")


def make_parser(prog: str | None = None) -> "TrlParser":
    """Parser of the options of `trl-kd eval`."""
    from trl_kd.scripts.arguments import option_parser

    return option_parser(EvalArguments, DESCRIPTION, prog)


def run(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Parse the command line and evaluate."""
    from trl_kd.scripts.arguments import parse_options

    parser = make_parser(prog)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = parse_options(parser, arguments, check=check_arguments)
    try:
        return main(*args, command=shlex.join([parser.prog, *arguments]))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        # Status 1 is for a regression
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except Exception:
        traceback.print_exc()
        return 2


if __name__ == "__main__":
    raise SystemExit(run())
