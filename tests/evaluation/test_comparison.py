"""Estimates, changes and verdicts of runs whose values are put in by hand, and how they are told."""

import json
import math

import pytest
from rich.console import Console

from trl_kd.evaluation import Change, ComparedModel, Comparison, Estimate, ModelEntry, ResultStore, Sample, compare_run
from trl_kd.evaluation.comparison import check_same_questions, training_log


SAME = "not distinguishable at 95 %"
SETTINGS = {"name": "s", "metrics": ["rouge_l", "nll", "length", "imitation_gap"], "main_metric": "nll", "top_p": 1.0}
TEACHER = ModelEntry("teacher", "teacher", "big", "aa", "tt", 1000, 4000)
BEFORE = ModelEntry("before", "before", "small", "bb", "tt", 250, 900)
STUDENT = ModelEntry("amm", "student", "out", "cc", "tt", 250, 900)
# What is hard for one model is hard for the other: far more spread between prompts than between models
HARD = [[10.0, 20.0, 40.0, 80.0, 15.0, 25.0], [12.0, 22.0, 38.0, 78.0, 18.0, 24.0]]
# Like HARD, with changes to and fro that sum to nothing much
NOISY = [[14.0, 15.0, 47.0, 73.0, 20.0, 20.0], [8.0, 27.0, 33.0, 84.0, 12.0, 29.0]]
WEIGHTS = [[1.0, 3.0, 2.0, 5.0, 4.0, 6.0], [2.0, 2.0, 2.0, 7.0, 1.0, 3.0]]


def shifted(by: float, values=HARD) -> list[list[float]]:
    return [[value + by for value in row] for row in values]


def sample(index: int, completion: str, values: dict) -> Sample:
    return Sample(index, f"p{index}", [], completion, [completion], None, True, values, [1])


def put(store, models: dict, settings=SETTINGS, name="first", data="d", finish=True, **kwargs) -> int:
    """A run with values `(S, P)`, or a pair of them and weights, by model entry and metric."""
    with store.begin("eval", name, settings, data, "rows", list(models), {"torch": "2"}, **kwargs) as run:
        for entry, metrics in models.items():
            pairs = {key: found if isinstance(found, tuple) else (found, None) for key, found in metrics.items()}
            for seed, index in ((seed, index) for seed in range(2) for index in range(6)):
                values = {
                    key: (values[seed][index], 1.0 if weights is None else weights[seed][index])
                    for key, (values, weights) in pairs.items()
                }
                run.add_samples(entry.name, seed, [sample(index, f"{entry.name} says {seed}{index}", values)])
        if finish:
            run.finish()
    return run.id


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "r.sqlite")


def weighted_mean(values, weights) -> float:
    pairs = [(v, w) for row, other in zip(values, weights, strict=True) for v, w in zip(row, other, strict=True)]
    return sum(v * w for v, w in pairs) / sum(w for _, w in pairs)


# Estimates and changes


def test_compare_run_estimate_is_the_weighted_mean_with_an_interval_about_it(store):
    put(store, {STUDENT: {"nll": (HARD, WEIGHTS), "rouge_l": HARD}})
    (model,) = compare_run(store).models
    found = model.estimates["nll"]
    assert found.value == pytest.approx(weighted_mean(HARD, WEIGHTS))
    assert found.low < found.value < found.high and found.high - found.low > 10
    assert model.estimates["rouge_l"].value == pytest.approx(sum(map(sum, HARD)) / 12)
    assert model.changes == model.to_teacher == {}


def test_compare_run_change_is_paired_by_prompt_and_seed(store):
    """Half a point more everywhere is beyond doubt, though the prompts are 70 points apart."""
    number = put(
        store,
        {
            TEACHER: {"rouge_l": shifted(2.0), "nll": shifted(-1.0), "length": HARD},
            BEFORE: {"rouge_l": HARD, "nll": HARD, "length": HARD},
            STUDENT: {"rouge_l": shifted(0.5), "nll": shifted(0.25), "length": shifted(-3.0)},
        },
    )
    comparison = compare_run(store, number)
    teacher, before, student = comparison.models
    mean = sum(map(sum, HARD)) / 12
    expected = {"rouge_l": (0.5, "better"), "nll": (0.25, "worse"), "length": (-3.0, "lower")}
    assert student.changes.keys() == expected.keys()
    for metric, (value, says) in expected.items():
        change = student.changes[metric]
        assert (change.metric, change.against, change.verdict) == (metric, "before", says)
        found = change.estimate
        assert [found.value, found.low, found.high] == pytest.approx([value] * 3) and found.standard_error < 1e-9
        assert change.relative == pytest.approx(value / mean)
    assert student.to_teacher["rouge_l"].estimate.value == pytest.approx(-1.5)
    assert student.to_teacher["rouge_l"].verdict == "worse" and student.to_teacher["nll"].against == "teacher"
    assert teacher.changes == teacher.to_teacher == before.changes == {}
    assert before.to_teacher["nll"].estimate.value == pytest.approx(1.0)


def test_compare_run_change_within_noise_is_not_distinguishable(store):
    put(store, {BEFORE: {"rouge_l": HARD}, STUDENT: {"rouge_l": NOISY}})
    change = compare_run(store).models[1].changes["rouge_l"]
    assert change.verdict == SAME and change.estimate.low < 0 < change.estimate.high
    assert change.estimate.value == pytest.approx((sum(map(sum, NOISY)) - sum(map(sum, HARD))) / 12)
    put(store, {BEFORE: {"rouge_l": HARD}, STUDENT: {"rouge_l": HARD}})
    change = compare_run(store).models[1].changes["rouge_l"]
    assert (change.verdict, change.relative) == (SAME, 0.0)
    assert change.estimate == Estimate(0.0, 0.0, 0.0, 0.0)


def test_compare_run_change_is_of_weighted_means_each_by_its_own_weights(store):
    other = shifted(1.0, WEIGHTS[::-1])
    put(store, {BEFORE: {"nll": (HARD, WEIGHTS)}, STUDENT: {"nll": (NOISY, other)}})
    change = compare_run(store).models[1].changes["nll"]
    assert change.estimate.value == pytest.approx(weighted_mean(NOISY, other) - weighted_mean(HARD, WEIGHTS))


def test_compare_run_relative_change_is_of_the_size_of_the_baseline(store):
    negative = [[-value for value in row] for row in HARD]
    put(
        store,
        {
            BEFORE: {"nll": negative, "rouge_l": shifted(0.0, [[0.0] * 6] * 2)},
            STUDENT: {"nll": shifted(4.0, negative), "rouge_l": HARD},
        },
    )
    changes = compare_run(store).models[1].changes
    assert changes["nll"].relative == pytest.approx(4.0 / (sum(map(sum, HARD)) / 12))
    assert changes["rouge_l"].relative is None


def test_compare_run_imitation_gap_is_the_paired_difference_to_the_teachers_own(store):
    settings = SETTINGS | {"main_metric": "imitation_gap"}
    number = put(
        store,
        {
            TEACHER: {"own_teacher_nll": (HARD, WEIGHTS)},
            BEFORE: {"own_teacher_nll": (shifted(0.75), WEIGHTS)},
            STUDENT: {"own_teacher_nll": (shifted(0.5), WEIGHTS)},
        },
        settings,
    )
    teacher, before, student = compare_run(store, number).models
    assert teacher.estimates == {"imitation_gap": Estimate(0.0, 0.0, 0.0, 0.0)}
    gap = student.estimates["imitation_gap"]
    # The same for each prompt: no spread, though that of the teacher's log-likelihood itself is wide
    assert [gap.value, gap.low, gap.high] == pytest.approx([0.5] * 3)
    assert student.to_teacher["imitation_gap"].estimate == gap
    change = student.changes["imitation_gap"]
    assert change.estimate.value == pytest.approx(-0.25) and change.verdict == "better"
    assert change.relative == pytest.approx(-0.25 / 0.75)


def test_compare_run_without_a_teacher_has_no_gap(store):
    put(store, {BEFORE: {"nll": HARD}, STUDENT: {"nll": HARD}})
    assert all(model.estimates.keys() == {"nll"} for model in compare_run(store).models)


def test_compare_run_metrics_without_any_weight_are_left_out(store):
    none = [[0.0] * 6] * 2
    put(store, {BEFORE: {"nll": HARD, "rouge_l": (none, none)}, STUDENT: {"nll": HARD, "rouge_l": HARD}})
    before, student = compare_run(store).models
    assert "rouge_l" not in before.estimates and "rouge_l" in student.estimates
    assert student.changes.keys() == {"nll"}


def test_compare_run_nats_per_token_are_not_compared_across_tokenizers(store):
    other = ModelEntry("amm", "student", "out", "cc", "other")
    settings = SETTINGS | {"metrics": ["nll", "bits_per_byte"]}
    values = {"nll": HARD, "bits_per_byte": HARD}
    put(store, {TEACHER: values, BEFORE: values, other: values}, settings)
    teacher, before, student = compare_run(store).models
    assert before.to_teacher.keys() == {"nll", "bits_per_byte"}
    assert student.to_teacher.keys() == student.changes.keys() == {"bits_per_byte"}
    assert student.estimates.keys() == {"nll", "bits_per_byte"}


def test_compare_run_shows_the_main_metric_first_and_what_was_measured(store):
    put(store, {TEACHER: {"rouge_l": HARD, "length": HARD, "nll": HARD, "secret": HARD}})
    comparison = compare_run(store)
    assert comparison.metrics == ["nll", "rouge_l", "length"]
    assert (comparison.num_prompts, comparison.seeds) == (6, [0, 1])
    assert (comparison.title, comparison.dataset, comparison.settings) == ("first", "rows", SETTINGS)
    assert (comparison.run_id, comparison.versions) == (1, {"torch": "2"})


def test_compare_run_details_come_with_the_models(store):
    with store.begin("eval", "first", SETTINGS, "d", "rows", [STUDENT], {}) as run:
        values = {"nll": (1.0, 1.0)}
        run.add_samples("amm", 0, [Sample(0, "p", [], "c", [], None, True, values, [1])])
        for key in ("cost", "by_position", "judge", "harness"):
            run.set_details("amm", key, {"is": key})
        run.finish()
    (model,) = compare_run(store).models
    for key in ("cost", "by_position", "judge", "harness"):
        assert getattr(model, key) == {"is": key}
    assert (model.parameters, model.size_on_disk, model.weights, model.source) == (250, 900, "cc", "out")
    # One prompt has no error bar
    assert model.estimates["nll"].value == 1.0 and math.isnan(model.estimates["nll"].low)


# Baselines and other runs


def test_compare_run_another_baseline_is_taken_by_name(store):
    put(store, {BEFORE: {"nll": HARD}, STUDENT: {"nll": shifted(1.0)}, TEACHER: {"nll": shifted(3.0)}})
    before, student, _ = compare_run(store, baseline="amm").models
    assert before.changes["nll"].estimate.value == pytest.approx(-1.0) and before.changes["nll"].against == "amm"
    assert student.changes == {}
    with pytest.raises(ValueError, match=r"There is no model 'sft' in run 1: it has \['before', 'amm', 'teacher'\]"):
        compare_run(store, baseline="sft")


def test_compare_run_against_another_run_pairs_models_by_name(store):
    first = put(store, {BEFORE: {"nll": HARD}, STUDENT: {"nll": shifted(1.0)}})
    newer = ModelEntry("amm", "student", "out", "c2", "tt")
    put(store, {BEFORE: {"nll": HARD}, newer: {"nll": shifted(0.5)}}, name="second")
    before, student = compare_run(store, "second", against=(store, first)).models
    assert student.changes["nll"].estimate.value == pytest.approx(-0.5)
    assert student.changes["nll"].against == "amm in run 1" and student.changes["nll"].verdict == "better"
    base = sum(map(sum, HARD)) / 12 + 1.0
    assert student.changes["nll"].relative == pytest.approx(-0.5 / base)
    assert before.changes["nll"].verdict == SAME and before.changes["nll"].against == "before in run 1"


def test_compare_run_against_another_run_takes_its_only_student(store):
    put(store, {BEFORE: {"nll": HARD}, STUDENT: {"nll": shifted(1.0)}})
    renamed = ModelEntry("new", "student", "out", "c2", "tt")
    put(store, {renamed: {"nll": shifted(3.0)}}, name="second")
    (student,) = compare_run(store, "second", against=(store, "first")).models
    assert student.changes["nll"].estimate.value == pytest.approx(2.0)
    assert student.changes["nll"].against == "amm in run 1"


def test_compare_run_against_two_students_of_other_names_says_nothing(store):
    twin = ModelEntry("dskd", "student", "out", "dd", "tt")
    put(store, {STUDENT: {"nll": HARD}, twin: {"nll": HARD}})
    renamed = ModelEntry("new", "student", "out", "c2", "tt")
    put(store, {renamed: {"nll": HARD}}, name="second")
    assert compare_run(store, "second", against=(store, 1)).models[0].changes == {}


def test_compare_run_against_another_store(store, tmp_path):
    other = ResultStore(tmp_path / "other.sqlite")
    put(other, {STUDENT: {"nll": shifted(1.0)}})
    put(store, {STUDENT: {"nll": HARD}})
    (student,) = compare_run(store, against=(other, "latest")).models
    assert student.changes["nll"].estimate.value == pytest.approx(-1.0)


@pytest.mark.parametrize("metric", ["forward_kl", "own_total_variation", "imitation_gap"])
def test_compare_run_against_a_run_with_another_teacher_leaves_the_distance_to_it_out(store, metric):
    """Distances to two teachers have no difference that would be about the student."""
    kept = "own_teacher_nll" if metric == "imitation_gap" else metric
    settings = SETTINGS | {"metrics": ["nll", metric]}
    values = {"nll": HARD, kept: HARD}
    put(store, {TEACHER: values, STUDENT: values}, settings)
    other = ModelEntry("teacher", "teacher", "big", "a2", "tt")
    put(store, {TEACHER: values, STUDENT: values}, settings, name="same")
    put(store, {other: values, STUDENT: values}, settings, name="other")
    assert compare_run(store, "same", against=(store, 1)).models[1].changes.keys() == {"nll", metric}
    assert compare_run(store, "other", against=(store, 1)).models[1].changes.keys() == {"nll"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "other"}, "Run 2 and run 1 have different prompts or references, so their difference would say"),
        ({"settings": SETTINGS | {"top_p": 0.9}}, r"have different settings \(top_p\), so"),
        ({"settings": SETTINGS | {"seeds": [1]}}, r"have different settings \(seeds\), so"),
    ],
)
def test_compare_run_against_other_questions_is_refused(store, changes, message):
    put(store, {STUDENT: {"nll": HARD}})
    number = put(store, {STUDENT: {"nll": HARD}}, **{"name": "second"} | changes)
    with pytest.raises(ValueError, match=message):
        compare_run(store, number, against=(store, 1))
    with pytest.raises(ValueError, match="have different"):
        check_same_questions(store.run(1), store.run(number))


def test_compare_run_against_other_metrics_or_another_name_is_fine(store):
    put(store, {STUDENT: {"nll": HARD, "length": HARD}})
    settings = SETTINGS | {"metrics": ["nll"], "main_metric": None, "name": "t"}
    put(store, {STUDENT: {"nll": HARD}}, settings, name="second")
    assert compare_run(store, "second", against=(store, 1)).models[0].changes.keys() == {"nll"}


def test_compare_run_unknown_run_lists_those_there_are(store):
    put(store, {STUDENT: {"nll": HARD}})
    with pytest.raises(ValueError, match="The run is `7`, .*Name one of: 1 `first`"):
        compare_run(store, 7)


@pytest.mark.parametrize("begun", [False, True])
def test_compare_run_that_is_not_finished_is_refused(store, begun):
    with store.begin("eval", "first", SETTINGS, "d", "rows", [TEACHER, STUDENT], {}) as run:
        if begun:
            run.add_samples("teacher", 0, [Sample(0, "p", [], "c", [], None, True, {"nll": (1.0, 1.0)}, [1])])
    with pytest.raises(
        ValueError, match="Run 1 is not finished, so its models would be compared on different prompts"
    ):
        compare_run(store, run.id)


def test_compare_run_that_is_a_benchmark_is_refused(store):
    with store.begin("bench", "bench", {"sft": {}}, "d", "rows", [STUDENT], {}) as run:
        run.add_samples("amm", 0, [Sample(0, "p", [], "c", [], None, True, {"nll": (1.0, 1.0)}, [1])])
        run.finish()
    with pytest.raises(ValueError, match="Run 1 is a bench, whose table is made by `trl-kd bench`"):
        compare_run(store)


# In words


def made(verdicts: bool = True) -> Comparison:
    """A comparison without a store, with numbers that show how they are rounded."""

    def model(name, role, values, **kwargs):
        estimates = {
            key: Estimate(value, value - half, value + half, half / 2) for key, (value, half) in values.items()
        }
        return ComparedModel(name, role, f"models/{name}", kwargs.pop("parameters"), None, "ab", estimates, **kwargs)

    def change(metric, value, half, says, against="before"):
        return Change(metric, against, Estimate(value, value - half, value + half, half / 2), None, says)

    teacher = model("big", "teacher", {"rouge_l": (31.416, 1.25), "nll": (0.8, 0.00001)}, parameters=1_860_000)
    before = model("before", "before", {"rouge_l": (22.871, 1.3), "length": (37.0, math.nan)}, parameters=420_000)
    student = model(
        "amm|x",
        "student",
        {"rouge_l": (28.139, 1.2), "nll": (1.23456, 0.0214), "length": (32.44, 1.0)},
        parameters=420_000,
        changes={
            "rouge_l": change("rouge_l", 5.268, 1.1, "better"),
            "nll": change("nll", -0.125, 0.05, "better"),
            "length": change("length", -4.56, 6.0, SAME),
        },
        to_teacher={"rouge_l": change("rouge_l", -3.2, 1.0, "worse", "big")},
    )
    return Comparison(
        *(3, "AMM", "stories", "2026-11-23", {}, {}),
        metrics=["rouge_l", "nll", "length"],
        models=[teacher, before, student],
        num_prompts=12,
        seeds=[0, 1, 2],
    )


def test_markdown_table_is_this_one():
    assert made().markdown() == (
        "|  | big | before | amm/x | change from before |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| Rouge-L (of 100) ↑ | 31.42 ± 1.25 | 22.87 ± 1.30 | 28.14 ± 1.20 | +5.27 ± 1.10 better |\n"
        "| NLL (nats/token) ↓ | 0.800 ± <0.001 |  | 1.235 ± 0.021 | −0.125 ± 0.050 better |\n"
        "| length (tokens) |  | 37.0 ± – | 32.4 ± 1.0 | −4.6 ± 6.0 same |\n"
        "| parameters | 1.86M | 420,000 | 420,000 |  |\n"
    )


def test_terminal_table_has_the_same_cells():
    comparison, console = made(), Console(width=160, record=True)
    console.print(comparison.table())
    shown = console.export_text()
    lines = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in shown.splitlines()]
    markdown = [
        line.strip("| \n").split(" | ") for line in comparison.markdown().replace("amm/x", "amm|x").splitlines()
    ]
    cells = {" ".join(line) for line in lines}
    for row in markdown[2:]:
        assert " ".join(row).strip() in {" ".join(line).strip() for line in lines}, row
    assert "AMM: stories" in shown and "12 prompts, 3 seeds; ± half of the 95 % interval; ↑ more is better" in shown
    assert any("amm|x change from before" in cell for cell in cells)


def test_terminal_table_shows_brackets_as_they_are():
    comparison, console = made(), Console(width=200, record=True)
    comparison.title, comparison.dataset, comparison.models[2].name = "AMM[red]", "[/b]", "out[bold]"
    console.print(comparison.table())
    shown = console.export_text()
    assert "AMM[red]: [/b]" in shown and "out[bold]" in shown


def test_sentences_are_these():
    assert made().sentences() == [
        "amm|x has Rouge-L 28.14 ± 1.20 where before has 22.87: better; the teacher has 31.42 ± 1.25.",
        "amm|x against before. Better: Rouge-L (+5.27), NLL (−0.125); not distinguishable at 95 %: length.",
        "amm|x has 420,000 parameters, 22.6 % of the teacher's.",
    ]


def test_sentences_of_a_copy_say_so():
    comparison = made()
    student = comparison.models[2]
    none = Estimate(0.0, 0.0, 0.0, 0.0)
    student.to_teacher = {key: Change(key, "big", none, 0.0, SAME) for key in ("rouge_l", "nll")}
    sentence = "amm|x is not distinguishable from the teacher at 95 % by any of these measures."
    assert sentence in comparison.sentences()
    student.to_teacher["nll"] = Change("nll", "big", none, 0.0, "worse")
    assert sentence not in comparison.sentences()


def test_sentences_without_a_baseline_or_a_teacher_are_short():
    comparison = made()
    comparison.models = comparison.models[2:]
    comparison.models[0].changes, comparison.models[0].to_teacher = {}, {}
    assert comparison.sentences() == ["amm|x has Rouge-L 28.14 ± 1.20."]
    assert comparison.markdown().splitlines()[0] == "|  | amm/x |"


def test_sentences_without_a_student_say_so():
    comparison = made()
    comparison.models = comparison.models[:2]
    assert comparison.sentences() == ["big and before: no student to speak of."]


# Training logs


def test_training_log_is_that_of_the_folder_or_of_its_last_checkpoint(tmp_path):
    def write(folder, step):
        folder.mkdir(exist_ok=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step}]}))

    assert training_log("nobody/no-such-model") is training_log(str(tmp_path)) is None
    write(tmp_path / "checkpoint-9", 9)
    write(tmp_path / "checkpoint-10", 10)
    (tmp_path / "checkpoint-best").mkdir()
    assert training_log(str(tmp_path)) == [{"step": 10}]
    write(tmp_path, 12)
    assert training_log(str(tmp_path)) == [{"step": 12}]


def test_compare_run_brings_the_training_log_of_the_models_folder(store, tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    entry = ModelEntry("amm", "student", str(tmp_path), "cc", "tt")
    put(store, {entry: {"nll": HARD}, TEACHER: {"nll": HARD}})
    student, teacher = compare_run(store).models
    assert student.training == [{"step": 1, "loss": 2.0}] and teacher.training is None
