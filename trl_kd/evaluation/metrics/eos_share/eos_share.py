"""Share of predictions that end by themselves."""

import datasets
import evaluate

from trl_kd.evaluation.metrics.inputs import check_predictions, mean


_DESCRIPTION = "Share of predictions whose last token is an end-of-text token, times 100."
_INPUTS = """
Args:
    predictions (list of list of int): token ids, without padding.
    eos_token_ids (list of int): ids that end a text.
Returns:
    eos_share (float): mean over the predictions, from 0 to 100.
    values (list of float): 0 or 100 for each prediction.
"""


class EosShare(evaluate.Measurement):
    r"""Share of predictions that the model ended by itself; the others were cut at the greatest length."""

    def _info(self):
        return evaluate.MeasurementInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, predictions, eos_token_ids):
        check_predictions(predictions)
        ends = set(eos_token_ids)
        values = [100.0 * (bool(ids) and ids[-1] in ends) for ids in predictions]
        return {"eos_share": mean(values), "values": values}
