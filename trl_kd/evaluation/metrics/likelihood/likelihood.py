"""Likelihood of texts under a model."""

import math

import evaluate

from trl_kd.evaluation.metrics.scoring import features, finite, open_model, token_rows, weighted_mean
from trl_kd.evaluation.per_token import likelihood_rows


_DESCRIPTION = "How likely a model finds texts that follow prompts: nats per token, and bits per byte."
_INPUTS = """
Args:
    predictions (list of str or list of list of int): texts, or token ids.
    prompts (list of str or list of list of int): what each text follows, in the same form.
    model (str or PreTrainedModel): the model, or its folder, adapter or Hub name.
    tokenizer (PreTrainedTokenizerBase, optional): needed with a model object.
    batch_size (int, optional, defaults to 16): rows per batch.
    ended (bool, optional, defaults to True): whether texts are complete, so that their EOS counts; token ids are
        taken as they are.
Returns:
    nll (float): negative log-likelihood, in nats per token.
    bits_per_byte (float): the same in bits per byte of UTF-8, which models of any vocabulary can be compared by.
    values (dict of list of float): both for each prediction.
    weights (dict of list of float): its tokens and its bytes. Means by these weights are the two results.
"""


class Likelihood(evaluate.Metric):
    r"""
    Negative log-likelihood of texts under a model: sum_t -log q(y_t | x, y_{<t}) over all texts, divided by their
    tokens (`nll`, in nats) or by their bytes times ln 2 (`bits_per_byte`). Prompts are not counted.

    Texts are read as the trainers read a row of `prompt` and `completion`. A special token has no bytes; one row
    without any has weight 0 in `bits_per_byte`.

    Note:
        `evaluate`'s own `perplexity` takes no prompts, and averages exp(nll) over texts, so that short and unlikely
        texts decide; here each token counts the same, as in a training loss.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=features("predictions", "prompts"),
        )

    def _compute(self, predictions, prompts, model, tokenizer=None, batch_size=16, ended=True):
        loaded, reader = open_model("model", model, tokenizer)
        starts, completions = token_rows(reader, prompts, predictions, ended)
        rows = finite(likelihood_rows(loaded, starts, completions, batch_size=batch_size), "The likelihood")
        texts = [
            text if isinstance(text, str) else reader.text(start, ids)
            for text, start, ids in zip(predictions, starts, completions, strict=True)
        ]
        nats = [row.sum().item() for row in rows]
        tokens = [float(len(row)) for row in rows]
        sizes = [float(len(text.encode())) for text in texts]
        values = {
            "nll": [total / count for total, count in zip(nats, tokens, strict=True)],
            "bits_per_byte": [
                total / math.log(2.0) / size if size else 0.0 for total, size in zip(nats, sizes, strict=True)
            ],
        }
        weights = {"nll": tokens, "bits_per_byte": sizes}
        results = {name: weighted_mean(values[name], weights[name]) for name in values}
        return results | {"values": values, "weights": weights}
