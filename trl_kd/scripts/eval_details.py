"""What `trl-kd eval` measures beside the suite, when all models have been evaluated: cost, benchmarks, preferences."""

from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl_kd.evaluation import Evaluation, Judge, Preference, ResultStore, Run


def add_costs(task: "Evaluation", run: "Run", store: "ResultStore", price_per_hour: float | None) -> None:
    """Measure what each model costs, one after the other, with nothing else running."""
    from tqdm.auto import tqdm

    from trl_kd.evaluation import measure_cost

    for model in tqdm(task.models, desc="Measuring costs", disable=not task.progress):
        kept = store.details(run.id, model.name, "cost")
        if kept is None or kept.get("price_per_hour") != price_per_hour:
            cost = measure_cost(model.model, model_init_kwargs=model.init_kwargs, price_per_hour=price_per_hour)
            run.set_details(model.name, "cost", cost)


def add_harness(task: "Evaluation", run: "Run", store: "ResultStore", tasks: Sequence[str], limit: int | None) -> None:
    """Run tasks of lm-evaluation-harness on each model."""
    from trl_kd.evaluation import run_harness

    options = {"tasks": list(tasks), "limit": limit}
    for model in task.models:
        if store.details(run.id, model.name, "harness_options") != options:
            loaded = model.load()
            found = run_harness(
                *(loaded, model.tokenizer, tasks),
                limit=limit,
                batch_size=task.batch_size,
                apply_chat_template=task.suite.chat,
            )
            run.set_details(model.name, "harness", found)
            run.set_details(model.name, "harness_options", options)
            del loaded


def add_judgement(task: "Evaluation", run: "Run", store: "ResultStore", judge: "Judge") -> None:
    """Let a judge prefer the texts of each student or those of the baseline, on the first seed."""
    from trl_kd.evaluation import Preference, estimate, judge_pairs, preference_summary

    roles = {model.role: model.name for model in task.models}
    baseline, seed = roles.get("before", roles.get("teacher")), task.suite.seeds[0]
    other = store.samples(run.id, baseline, seed)
    for model in task.models:
        if model.name == baseline or model.role == "teacher":
            continue
        kept = [Preference.from_dict(row) for row in store.details(run.id, model.name, "judge_pairs") or []]
        own = store.samples(run.id, model.name, seed)

        def keep(preference: "Preference", name: str = model.name, kept: "list[Preference]" = kept) -> None:
            kept.append(preference)
            run.set_details(name, "judge_pairs", [each.to_dict() for each in kept])

        texts = ([s.prompt for s in own], [s.completion for s in own], [s.completion for s in other])
        found = judge_pairs(judge, *texts, references=[s.references for s in own], done=kept, on_result=keep)
        wins = estimate([[each.value for each in found]], [[1.0] * len(found)])
        has_interval = len(found) > 1
        interval = {"low": wins.low if has_interval else None, "high": wins.high if has_interval else None}
        result = preference_summary(found) | interval | {"against": baseline, "settings": judge.settings()}
        run.set_details(model.name, "judge", result)
