"""Length in tokens."""

import datasets
import evaluate

from trl_kd.evaluation.metrics.inputs import check_predictions, mean


_DESCRIPTION = "Number of tokens of each prediction."
_INPUTS = """
Args:
    predictions (list of list of int): token ids, with the one that ended the text if there is one, without padding.
Returns:
    length (float): mean over the predictions.
    values (list of float): of each prediction.
"""


class Length(evaluate.Measurement):
    r"""
    Length of the predictions in tokens, the end-of-text token included where there is one.

    Tokens are those of the model that wrote the text. Models with different vocabularies count in different units.
    """

    def _info(self):
        return evaluate.MeasurementInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, predictions):
        check_predictions(predictions)
        values = [float(len(ids)) for ids in predictions]
        return {"length": mean(values), "values": values}
