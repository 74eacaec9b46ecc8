"""chrF of each prediction, by sacrebleu."""

import datasets
import evaluate

from trl_kd.evaluation.metrics.inputs import check_references, mean


_DESCRIPTION = "chrF of each prediction with its nearest reference: F-score of character n-grams, from 0 to 100."
_INPUTS = """
Args:
    predictions (list of str): generated texts.
    references (list of list of str): references of each prediction, of which the nearest counts.
    word_order (int, optional, defaults to 0): longest word n-gram that counts too; 2 makes it chrF++.
Returns:
    chrf (float): mean over the predictions, from 0 to 100.
    values (list of float): of each prediction.
"""
_CITATION = """@inproceedings{popovic-2015-chrf,
    title = "chr{F}: character n-gram {F}-score for automatic {MT} evaluation",
    author = "Popovi{\'c}, Maja",
    booktitle = "Proceedings of the Tenth Workshop on Statistical Machine Translation",
    year = "2015",
}"""


class Chrf(evaluate.Metric):
    r"""
    chrF: F-score (beta 2) of the character n-grams, n from 1 to 6, that a prediction shares with a reference.

    Note:
        Sentence chrF by `sacrebleu` with its defaults, and the mean over predictions, so that each prediction has a
        value of its own. `sacrebleu`'s corpus chrF, which translation papers report, sums the counts of n-grams over
        all predictions first: it gives long texts more weight.
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

    def _download_and_prepare(self, dl_manager):
        # Before hours are spent on generation
        _sacrebleu_metrics()

    def _compute(self, predictions, references, word_order=0):
        check_references(predictions, references, "chrf")
        scorer = _sacrebleu_metrics().CHRF(word_order=word_order)
        values = [
            scorer.sentence_score(prediction, texts).score
            for prediction, texts in zip(predictions, references, strict=True)
        ]
        return {"chrf": mean(values), "values": values}


def _sacrebleu_metrics():
    try:
        import sacrebleu.metrics
    except ImportError as error:
        raise ImportError(
            "The metric 'chrf' needs `sacrebleu`, which is not installed. Install the extra `trl_kd[translation]`, or "
            "leave 'chrf' out."
        ) from error
    return sacrebleu.metrics
