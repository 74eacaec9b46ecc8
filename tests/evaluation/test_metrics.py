import json
import os
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import evaluate
import pytest
from rouge_score import rouge_scorer

from trl_kd.evaluation.metrics import METRIC_MODULES, load_metric, text_values


# Inflected, so that the stemmer matters, and in other scripts, which rouge_score does not read
WORDS = "run running runs ran jump jumped cats cat's CAT generously naïve Straße 北京 где 42 3.14 , . the a of".split()


def random_text(rng: random.Random, longest: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(longest + 1)))


# Rouge-L


def test_rouge_l_is_that_of_rouge_score_with_a_stemmer():
    rng = random.Random(0)
    predictions = ["", "   ", *(random_text(rng) for _ in range(300))]
    # A word is put first, as no reference may be empty
    references = [[f"the {random_text(rng)}" for _ in range(rng.randint(1, 4))] for _ in predictions]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    expected = [
        100 * max(scorer.score(target=text, prediction=prediction)["rougeL"].fmeasure for text in texts)
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    assert text_values("rouge_l", predictions, references) == expected
    result = load_metric("rouge_l").compute(predictions=predictions, references=references)
    assert result["values"] == expected
    assert result["rouge_l"] == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_rouge_l_by_hand():
    # Stems in common, in order: "cat sat", 2 of 3 and 3 words, against the second reference none
    assert text_values("rouge_l", ["The cats sat"], [["a cat sat", "dogs"]]) == [pytest.approx(200 / 3)]
    # Precision 1 / 4, recall 1 / 1; a mean over references would halve it
    assert text_values("rouge_l", ["w x y z"], [["z", "q"]]) == [pytest.approx(40.0)]
    assert text_values("rouge_l", [""], [["word"]]) == [0.0]


def test_rouge_l_of_other_scripts_warns(caplog):
    assert text_values("rouge_l", ["a", "где"], [["где", "a"], ["где", "北京"]]) == [100.0, 0.0]
    (record,) = caplog.records
    assert record.message == (
        "1 rows, the first of which is 1, have no reference with a letter from a to z or a digit, and Rouge-L reads "
        "nothing else: they score 0. Measure `chrf` for other scripts."
    )


# Exact match

# (prediction, reference, whether they match)
GSM8K_ANSWERS = [
    ("She has 3 + 4 = <<3+4=7>>7 apples.\n#### 7", "3 + 4 is 7.\n#### 7", True),
    ("#### 7", "#### 8", False),
    ("#### 1,234", "#### 1234", True),
    ("#### 2,125,000", "#### 2125000", True),
    ("#### $18.00", "#### 18", True),
    ("#### -$5", "#### $-5", True),
    ("#### -5", "#### 5", False),
    ("#### \u22125", "#### -5", True),  # U+2212, the minus sign
    ("####72", "#### 72", True),
    ("#### 72.", "#### 72", True),
    ("#### 0.5", "#### .5", True),
    ("#### .5", "#### 5", False),
    # The first marker counts, whatever a model goes on to write
    ("#### 7\n\nQuestion: And of 9? #### 9", "#### 7", True),
    ("#### 7\n\nQuestion: And of 9? #### 9", "#### 9", False),
    # Marker and number are on one line
    ("####\n12 is not it, but 13", "#### 13", True),
    ("It costs 20 dollars ####\n", "#### 20", True),
    ("#### none\nSo 3 of 4", "#### 4", True),
    # Without a marker, the last number
    ("The answer is 72.", "#### 72", True),
    ("The answer is 72...", "#### 72", True),
    ("First 72, then 13", "#### 72", False),
    ("Total: $1,080!", "1080", True),
    ("She pays $3.50 in the end", "3.5", True),
    ("5-3", "3", True),
    ("It is (7)-3", "-3", False),
    ("It fell to -3 degrees", "#### -3", True),
    ("x=-3", "-3", True),
    ("80%", "80", True),
    ("about 1,2 or", "12", True),  # commas are taken off, as in both sources
    ("", "#### 1", False),
    ("no number at all ... $ , .", "#### 1", False),
    ("seven", "7", False),
    ("٧", "7", False),  # an Arabic seven: neither source reads it
]


@pytest.mark.parametrize(("prediction", "reference", "matches"), GSM8K_ANSWERS)
def test_exact_match_of_numbers(prediction, reference, matches):
    assert text_values("exact_match", [prediction], [[reference]]) == [100.0 * matches]


# (pattern, prediction, reference, whether they match)
PATTERN_ANSWERS = [
    (r"\(([A-D])\)", "Not (A), so the answer is (B).", "The answer is (B).", True),
    (r"\(([A-D])\)", "The answer is (B).", "B", True),
    (r"\(([A-D])\)", "B", "B", False),  # the prediction does not match, so there is no answer
    (r"\(([A-D])\)", "(A)", "(B)", False),
    (r"[A-D](?=\.)", "So B.", "B", True),
    (r"answer:(.*)", "answer:  Paris ", " Paris", True),
    (r"answer:(.*)", "answer: paris", "Paris", False),
    (r"(?s).*", "two\nlines", "two\nlines ", True),  # also matches nothing, after the text
    (r"(?s).*", "two\nlines", "one line", False),
    (r"a(x)?b", "ab", "c", False),  # a group that takes no part
    (r"(\w+) is (\w+)", "it is blue", "it", True),  # the first group
    (r"[0-9.]+", "18.0", "18", False),  # as text, not by value
]


@pytest.mark.parametrize(("pattern", "prediction", "reference", "matches"), PATTERN_ANSWERS)
def test_exact_match_by_a_pattern(pattern, prediction, reference, matches):
    assert text_values("exact_match", [prediction], [[reference]], pattern=pattern) == [100.0 * matches]


def test_exact_match_with_any_of_the_references():
    result = load_metric("exact_match").compute(predictions=["7", "8", "9"], references=[["1", "7"], ["1"], ["9"]])
    assert result == {"exact_match": pytest.approx(200 / 3), "values": [100.0, 0.0, 100.0]}


def test_exact_match_reference_without_a_number_raises():
    with pytest.raises(ValueError, match=r"^`references` has 'seven' in row 1, which holds no number, .* `pattern`"):
        text_values("exact_match", ["1", "2"], [["1"], ["2", "seven"]])


def test_exact_match_broken_pattern_raises():
    with pytest.raises(ValueError, match=r"^`pattern` is '\(', which is no regular expression: .* Mend it"):
        text_values("exact_match", ["1"], [["1"]], pattern="(")


# chrF


def test_chrf_is_that_of_sacrebleu():
    metrics = pytest.importorskip("sacrebleu.metrics")
    rng = random.Random(1)
    predictions = ["", *(random_text(rng) for _ in range(50))]
    references = [[f"w {random_text(rng)}" for _ in range(rng.randint(1, 3))] for _ in predictions]
    expected = [
        metrics.CHRF().sentence_score(prediction, texts).score
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    assert text_values("chrf", predictions, references) == expected
    plus = metrics.CHRF(word_order=2).sentence_score(predictions[3], references[3]).score
    assert text_values("chrf", predictions[3:4], references[3:4], word_order=2) == [plus]
    assert text_values("chrf", ["где"], [["где"]]) == [pytest.approx(100.0)]


def test_chrf_without_sacrebleu_raises_when_it_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    message = (
        "The metric 'chrf' needs `sacrebleu`, which is not installed. Install the extra `trl_kd[translation]`, or "
        "leave 'chrf' out."
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        load_metric("chrf")


# Distinct-n


def plain_distinct(predictions, n):
    seen, count = [], 0
    for tokens in predictions:
        for start in range(len(tokens)):
            gram = tokens[start : start + n]
            if len(gram) == n:
                count += 1
                if gram not in seen:
                    seen.append(gram)
    return len(seen) / count if count else 0.0


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("as_text", [True, False])
def test_distinct_n_and_its_influences_are_those_of_a_plain_loop(n, as_text):
    rng = random.Random(n)
    predictions = [[rng.randrange(6) for _ in range(rng.randrange(9))] for _ in range(17)]
    given = [" ".join(map(str, ids)) for ids in predictions] if as_text else predictions
    result = load_metric("distinct_n").compute(predictions=given, n=n)
    theta = plain_distinct(predictions, n)
    without = [plain_distinct(predictions[:i] + predictions[i + 1 :], n) for i in range(len(predictions))]
    expected = [theta + 16 * (sum(without) / 17 - each) for each in without]
    assert result["distinct_n"] == theta
    # Sums of 17 terms, times 16
    assert result["values"] == pytest.approx(expected, abs=1e-12)
    assert sum(result["values"]) / 17 == pytest.approx(theta, abs=1e-12)
    assert text_values(f"distinct_{n}", given) == result["values"]


def test_distinct_n_by_hand():
    # Pairs "a b", "b a" and "a b": 2 of 3 differ. Without the first 1 of 1, without the second 2 of 2
    result = load_metric("distinct_n").compute(predictions=["a b a", "a  b"])
    assert result == {"distinct_n": pytest.approx(2 / 3), "values": pytest.approx([2 / 3, 2 / 3])}
    # Without the first: 1 of 1; without the second: 1 of 2
    assert text_values("distinct_1", ["a a", "b"]) == pytest.approx([2 / 3 - 0.25, 2 / 3 + 0.25])
    assert text_values("distinct_2", ["", "a"]) == [0.0, 0.0]
    assert text_values("distinct_2", ["a b"]) == [1.0]


def test_distinct_n_bad_input_raises():
    with pytest.raises(ValueError, match="^`n` is 0, but an n-gram has at least one element. Set it to 1 or more.$"):
        text_values("distinct_n", ["a"], n=0)
    with pytest.raises(ValueError, match="^`predictions` has 1 texts and 2 lists of token ids, .* different units"):
        text_values("distinct_n", ["a", [1], [2]])


# Length and ends


def test_length_and_eos_share_by_hand():
    predictions = [[5, 6, 2], [], [2, 5], [3]]
    result = load_metric("length").compute(predictions=predictions)
    assert result == {"length": 1.5, "values": [3.0, 0.0, 2.0, 1.0]}
    result = load_metric("eos_share").compute(predictions=predictions, eos_token_ids=[2, 3])
    assert result == {"eos_share": 50.0, "values": [100.0, 0.0, 0.0, 100.0]}


# Loading

OFFLINE = """
import json, socket, sys

def refuse(*arguments, **options):
    raise OSError("a metric reached for the network")

socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
from trl_kd.evaluation.metrics import METRIC_MODULES, load_metric, text_values

assert text_values("rouge_l", ["a b"], [["a b"]]) == [100.0]
assert {load_metric(name).name for name in METRIC_MODULES if name != "chrf"} == METRIC_MODULES.keys() - {"chrf"}
from pathlib import Path
assert not list(Path(sys.argv[1]).rglob("*")), "load_metric wrote into the cache"

folders = {name: folder for name, folder in METRIC_MODULES.items() if name != "chrf"}
loaded = {name: evaluate.load(folder, keep_in_memory=True) for name, folder in folders.items()}
print(json.dumps([
    loaded["rouge_l"].compute(predictions=["a b"], references=[["a b"]]),
    loaded["exact_match"].compute(predictions=["#### 7"], references=[["8"]]),
    loaded["distinct_n"].compute(predictions=[[1, 1]], n=1),
    sorted(loaded),
]))
"""


def test_modules_load_without_the_network_and_load_metric_without_files(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    environment = os.environ | {"HF_HOME": str(cache)}
    for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(cache)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    names = sorted(METRIC_MODULES.keys() - {"chrf"})
    assert json.loads(result.stdout.splitlines()[-1]) == [
        {"rouge_l": 100.0, "values": [100.0]},
        {"exact_match": 0.0, "values": [0.0]},
        {"distinct_n": 0.5, "values": [0.5]},
        names,
    ]


@pytest.mark.parametrize("name", METRIC_MODULES)
def test_module_folder_is_a_package_of_its_name(name):
    """Or the wheel would not hold it."""
    assert Path(METRIC_MODULES[name], f"{name}.py").is_file()
    assert Path(METRIC_MODULES[name], "__init__.py").is_file()


def test_load_metric_unknown_name_raises_with_what_there_is(monkeypatch):
    listed = (
        "the package has rouge_l, exact_match, chrf, distinct_n, length, eos_share, likelihood, divergence, "
        "imitation_gap, there is no such path"
    )
    with pytest.raises(ValueError, match=f"^There is no metric './own/rogue': {listed}, .*/rogue.py. Name one of"):
        load_metric("./own/rogue")

    def fail(*arguments, **options):
        raise ConnectionError("No network.")

    monkeypatch.setattr(evaluate, "load", fail)
    with pytest.raises(ValueError, match=f"^There is no metric 'rogue': {listed}, .* No network. Name one of these"):
        text_values("rogue", ["a"], [["a"]])


# Modules of one's own


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where `evaluate` copies modules to, in place of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
            del sys.modules[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(folder / "modules"), *sys.path])
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder / "modules")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "metrics")
        forget()
        yield
        forget()


@pytest.fixture
def write_module(cache, tmp_path):
    def write(name, features, body):
        folder = tmp_path / name
        folder.mkdir()
        source = f"""
            import datasets
            import evaluate

            TEXT = datasets.Value("string")

            class Own(evaluate.Metric):
                def _info(self):
                    return evaluate.MetricInfo(
                        description="", citation="", inputs_description="", features=datasets.Features({features})
                    )

                def _compute(self, {", ".join(features_names(features))}, **options):
                    {body}
        """
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
        return str(folder)

    return write


def features_names(features: str) -> list[str]:
    return re.findall('"([a-z]+)":', features)


BOTH = '{"predictions": TEXT, "references": datasets.Sequence(TEXT)}'
SINGLE = '{"predictions": TEXT, "references": TEXT}'


def test_text_values_foreign_module_is_called_per_prediction(write_module):
    # What it returns for all at once, 3, is the mean of neither
    path = write_module("longest", BOTH, 'return {"other": 9.0, "longest": max(map(len, predictions))}')
    assert text_values(path, ["a", "bbb", "cc"], [["x"], ["y", "z"], ["x"]]) == [1.0, 3.0, 2.0]


def test_text_values_foreign_module_without_its_name_gives_its_first_number(write_module):
    path = write_module("counts", BOTH, 'return {"list": [1], "flag": True, "sum": len(references[0]), "last": 7}')
    assert text_values(path, ["a", "b"], [["x"], ["y", "z"]]) == [1.0, 2.0]


def test_text_values_foreign_module_with_values_is_called_for_all(write_module):
    path = write_module("ranks", BOTH, 'return {"ranks": 0.0, "values": [len(predictions)] * len(predictions)}')
    assert text_values(path, ["a", "b", "c"], [["x"]] * 3) == [3.0, 3.0, 3.0]


def test_text_values_foreign_module_of_single_references(write_module):
    path = write_module("same", SINGLE, 'return {"same": predictions[0] == references[0]} | {"same": 0.5}')
    assert text_values(path, ["a"], [["a"]]) == [0.5]
    with pytest.raises(ValueError, match="takes one reference per prediction, but row 1 has 2. Keep one"):
        text_values(path, ["a", "b"], [["a"], ["b", "c"]])


def test_text_values_foreign_measurement_gets_its_data(write_module):
    path = write_module("letters", '{"data": TEXT}', 'return {"letters": len(data[0])}')
    assert text_values(path, ["a", "bb"]) == [1.0, 2.0]


def test_text_values_foreign_options_reach_the_module(write_module):
    path = write_module("optional", '{"predictions": TEXT}', 'return {"optional": options["k"]}')
    assert text_values(path, ["a"], [["unused"]], k=4) == [4.0]


def test_text_values_foreign_module_that_cannot_be_used_raises(write_module):
    path = write_module("sourced", '{"predictions": TEXT, "sources": TEXT}', 'return {"sourced": 1.0}')
    with pytest.raises(ValueError, match=r"needs \['predictions', 'sources'\], but there are texts and references"):
        text_values(path, ["a"], [["a"]])
    path = write_module("wordy", BOTH, 'return {"wordy": "good"}')
    with pytest.raises(ValueError, match=r"returned \['wordy'\], none of which is a number, .* prediction 0"):
        text_values(path, ["a"], [["a"]])
    path = write_module("broken", BOTH, 'return {"broken": float("nan") if predictions[0] == "b" else 1.0}')
    with pytest.raises(ValueError, match="is nan for prediction 1, which no mean can hold"):
        text_values(path, ["a", "b"], [["a"], ["b"]])


# What is wrong with references


@pytest.mark.parametrize("name", ["rouge_l", "exact_match", "chrf"])
@pytest.mark.parametrize(
    ("references", "message"),
    [
        (None, "compares with references, but `references` is None. Pass a list of references"),
        ([["1"]], "`references` has 1 rows but `predictions` has 2. .* Pass as many rows as predictions."),
        ([["1"], []], "`references` has no reference in row 1, so there is nothing to compare"),
        ([["1"], ["1", " \n"]], "`references` has an empty text in row 1, which no prediction can resemble."),
        (["1", "2"], "`references` has a text in row 0, but a prediction may have several references."),
    ],
)
def test_text_values_bad_references_raise(name, references, message):
    if name == "chrf":
        pytest.importorskip("sacrebleu")
    with pytest.raises(ValueError, match=message):
        text_values(name, ["1", "2"], references)


@pytest.mark.parametrize("name", ["rouge_l", "exact_match"])
def test_module_checks_references_when_it_is_called_itself(name):
    with pytest.raises(ValueError, match="`references` has an empty text in row 0"):
        load_metric(name).compute(predictions=["1"], references=[[""]])


@pytest.mark.parametrize("name", METRIC_MODULES)
def test_text_values_without_predictions_or_without_the_model_raises(name):
    if name == "chrf":
        pytest.importorskip("sacrebleu")
    if name in ("likelihood", "divergence", "imitation_gap"):
        with pytest.raises(ValueError, match=f"^The metric '{name}' needs .*'prompts'"):
            text_values(name, ["a"], [["a"]])
    else:
        with pytest.raises(ValueError, match="^`predictions` is empty, so there is nothing to measure."):
            text_values(name, [], [])
