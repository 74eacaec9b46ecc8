"""Rouge-L as the literature on knowledge distillation computes it."""

import re

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer
from transformers.utils import logging

from trl_kd.evaluation.metrics.inputs import check_references, mean


logger = logging.get_logger(__name__)

_DESCRIPTION = "Rouge-L of each prediction with its nearest reference: F-measure, with a stemmer, times 100."
_INPUTS = """
Args:
    predictions (list of str): generated texts.
    references (list of list of str): references of each prediction, of which the nearest counts.
Returns:
    rouge_l (float): mean over the predictions, from 0 to 100.
    values (list of float): of each prediction.
"""
_CITATION = """@inproceedings{lin-2004-rouge,
    title = "{ROUGE}: A Package for Automatic Evaluation of Summaries",
    author = "Lin, Chin-Yew",
    booktitle = "Text Summarization Branches Out",
    year = "2004",
}"""


class RougeL(evaluate.Metric):
    r"""
    Rouge-L: how much of the nearest reference a prediction has in common with it, word by word and in order.

    With c the length of the longest common subsequence of words, precision c / |prediction| and recall
    c / |reference|, a prediction's value is 100 times the largest of their harmonic means over its references.

    Note:
        As `rouge_metric.py` computes it in the authors' code of ToDi (`code/rouge_metric.py`, `compute_metrics` with
        `rouge` and `metric_max_over_ground_truths`) and of AdaKD: the package `rouge_score`, its Porter stemmer,
        F-measure, maximum over the references, mean over the predictions, times 100. MiniLLM and DSKD import a
        function of that name from a file of that name (`evaluate_main.py`), which was not read. The authors round
        to 4 decimals and drop what is longer of predictions and references; here nothing is rounded, and other
        lengths are an error. `evaluate`'s own `rouge` has no stemmer unless asked, and counts from 0 to 1.

        `rouge_score` knows the letters a to z and digits alone. A reference without any scores 0.
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

    def _compute(self, predictions, references):
        check_references(predictions, references, "rouge_l")
        unread = [i for i, texts in enumerate(references) if not re.search("[a-z0-9]", " ".join(texts).lower())]
        if unread:
            logger.warning(
                f"{len(unread)} rows, the first of which is {unread[0]}, have no reference with a letter from a to z "
                "or a digit, and Rouge-L reads nothing else: they score 0. Measure `chrf` for other scripts."
            )
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        values = [
            100.0 * max(scorer.score(text, prediction)["rougeL"].fmeasure for text in texts)
            for prediction, texts in zip(predictions, references, strict=True)
        ]
        return {"rouge_l": mean(values), "values": values}
