"""Exact match of the answers that texts end in."""

import re
from decimal import Decimal

import datasets
import evaluate

from trl_kd.evaluation.metrics.inputs import check_references, mean


# A minus counts if it cannot be a dash or a difference; `$-5` and `-$5` are the same
_NUMBER = r"(?:(?<![\w.)\]])[-\u2212])?\$?(?:(?<=\$)[-\u2212])?(?:[0-9][0-9,]*(?:\.[0-9]+)?|(?<!\w)\.[0-9]+)"
_MARKED = re.compile(rf"####[ \t]*({_NUMBER})")
_ANY = re.compile(_NUMBER)

_DESCRIPTION = "Share of predictions whose answer is that of a reference, times 100."
_INPUTS = """
Args:
    predictions (list of str): generated texts.
    references (list of list of str): texts that hold a right answer.
    pattern (str, optional): regular expression of an answer; its first group, if it has one. The last match counts.
        Without it, answers are numbers as in GSM8K: the one after ####, else the last of the text.
Returns:
    exact_match (float): mean over the predictions, from 0 to 100.
    values (list of float): 0 or 100 for each prediction.
"""
_CITATION = """@article{cobbe2021gsm8k,
    title = {Training Verifiers to Solve Math Word Problems},
    author = {Cobbe, Karl and Kosaraju, Vineet and Bavarian, Mohammad and others},
    journal = {arXiv preprint arXiv:2110.14168},
    year = {2021},
}"""


class ExactMatch(evaluate.Metric):
    r"""
    Exact match of answers, with their extraction: those of GSM8K, or by a pattern of one's own.

    Without `pattern`, an answer is the number after the first `####` that has one, else the last number of the text.
    Two numbers are the same if their values are. With `pattern`, an answer is the last match, compared as text without
    the spaces around it; a reference that does not match is an answer as a whole.

    Note:
        The authors of GSM8K (openai/grade-school-math, `grade_school_math/dataset.py`, `extract_answer`) take the
        first `#### ` that is followed by digits, full stops and commas, take the commas off and compare texts; a text
        without it is wrong. lm-evaluation-harness (`lm_eval/tasks/gsm8k/gsm8k.yaml`, version 3.0) calls that
        `strict-match`, and adds `flexible-extract`: the last run of digits, `$`, full stops and commas; it takes
        commas, `$` and a final full stop off. Ours: the marker first and the last number otherwise, in one figure; `$`
        and any space may stand before the number; a number is well formed, so a lone `...` is none; `5-3` ends in 3
        and not in -3; and numbers are compared by value, so 18.00 is 18.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions, references, pattern=None):
        check_references(predictions, references, "exact_match")
        extract = _last_number if pattern is None else _pattern_extractor(pattern)
        values = []
        for index, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
            answers = [extract(text) for text in texts]
            if pattern is not None:
                answers = [
                    text.strip() if found is None else found for text, found in zip(texts, answers, strict=True)
                ]
            elif None in answers:
                raise ValueError(
                    f"`references` has {texts[answers.index(None)]!r} in row {index}, which holds no number, so no "
                    "prediction can be right. Remove the row, or say by `pattern` what an answer looks like."
                )
            values.append(100.0 * (extract(prediction) in answers))
        return {"exact_match": mean(values), "values": values}


def _last_number(text):
    """The number that a text gives as its answer, or None."""
    marked = _MARKED.search(text)
    numbers = [marked.group(1)] if marked else _ANY.findall(text)
    return Decimal(re.sub(r"[$,]", "", numbers[-1]).replace("\u2212", "-")) if numbers else None


def _pattern_extractor(pattern):
    """A function that gives the last match of a pattern within a text, or None."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`pattern` is {pattern!r}, which is no regular expression: {error}. Mend it, and escape what is meant "
            "literally by a backslash."
        ) from error

    def extract(text):
        matches = [match.group(min(1, compiled.groups)) for match in compiled.finditer(text)]
        # A pattern that may match nothing does so at the end of a text; a group may have taken no part
        matches = [match.strip() for match in matches if match and match.strip()]
        return matches[-1] if matches else None

    return extract
