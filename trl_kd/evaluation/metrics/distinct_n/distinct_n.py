"""Share of different n-grams."""

from collections import Counter

import datasets
import evaluate

from trl_kd.evaluation.metrics.inputs import check_predictions


_DESCRIPTION = "Share of different n-grams among all n-grams of all predictions."
_INPUTS = """
Args:
    predictions (list of str or list of list of int): texts, whose words are counted, or token ids.
    n (int, optional): length of an n-gram. Defaults to that of the configuration: `config_name="distinct_3"` makes it
        3; without one it is 2.
Returns:
    distinct_n (float): from 0 to 1; 0 if no prediction has an n-gram.
    values (list of float): influence of each prediction; their mean is `distinct_n`.
"""
_CITATION = """@inproceedings{li-etal-2016-diversity,
    title = "A Diversity-Promoting Objective Function for Neural Conversation Models",
    author = "Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill",
    booktitle = "Proceedings of NAACL-HLT",
    year = "2016",
}"""


class DistinctN(evaluate.Measurement):
    r"""
    Distinct-n: how many different n-grams the predictions hold together, for each n-gram that they hold.

    It is one number for all P predictions, no mean over them. So that an error bar can be made from values per
    prediction all the same, with theta the whole and theta_{-i} what it is without prediction i, the values are

        v_i = theta + (P - 1) (mean_j theta_{-j} - theta_{-i}),

    the jackknife's influence of each prediction around theta. Their mean is theta. Resampling predictions themselves
    would not do: a prediction that is drawn twice adds no new n-gram, so each resample looks less diverse than the
    data are.

    The more text, the fewer of its n-grams are new: compare only what has as many predictions, of like length.

    Note:
        Words are what white space separates, with their punctuation and case. [Li et al.](https://huggingface.co/papers/1510.03055)
        divide by the number of tokens, which for n = 1 is the same; here n-grams are divided by n-grams, as in
        [`generation.distinct_n`], so that 1 can be reached for each n.
    """

    def _info(self):
        # Ids first: a list of them would pass for a text, but no text for a list
        return evaluate.MeasurementInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
                datasets.Features({"predictions": datasets.Value("string")}),
            ],
        )

    def _compute(self, predictions, n=None):
        check_predictions(predictions)
        if n is None:
            n = 2 if self.config_name == "default" else int(self.config_name.removeprefix("distinct_"))
        if n < 1:
            raise ValueError(f"`n` is {n}, but an n-gram has at least one element. Set it to 1 or more.")
        grams = [
            _ngrams(prediction.split() if isinstance(prediction, str) else prediction, n) for prediction in predictions
        ]
        num_holders = Counter(gram for each in grams for gram in set(each))
        total, different = sum(map(len, grams)), len(num_holders)
        theta = _share(different, total)
        if len(grams) == 1:
            return {"distinct_n": theta, "values": [theta]}
        without = [
            _share(different - sum(num_holders[gram] == 1 for gram in set(each)), total - len(each)) for each in grams
        ]
        centre = sum(without) / len(without)
        return {"distinct_n": theta, "values": [theta + (len(grams) - 1) * (centre - each) for each in without]}


def _ngrams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _share(different, total):
    return different / total if total else 0.0
