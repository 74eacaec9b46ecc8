"""Divergence of a model from its teacher."""

import evaluate

from trl_kd.evaluation.metrics.scoring import features, finite, open_model, token_rows, weighted_mean
from trl_kd.evaluation.per_token import compare_rows


_DESCRIPTION = "How far a model's next-token distributions are from a teacher's, at each token of given texts."
_INPUTS = """
Args:
    predictions (list of str or list of list of int): texts, or token ids; references, or what a model wrote.
    prompts (list of str or list of list of int): what each text follows, in the same form.
    model (str or PreTrainedModel): the model to be judged, or its folder, adapter or Hub name.
    teacher (str or PreTrainedModel): the model to be imitated, likewise, with the same vocabulary.
    tokenizer (PreTrainedTokenizerBase, optional): needed with a model object.
    batch_size (int, optional, defaults to 16): rows per batch.
    top_p (float, optional, defaults to 1.0): mass of the nucleus that both are sampled from, if that is compared.
    ended (bool, optional, defaults to True): whether texts are complete, so that their EOS counts; token ids are
        taken as they are.
Returns:
    forward_kl (float): KL(teacher || model), in nats per token.
    reverse_kl (float): KL(model || teacher), in nats per token.
    total_variation (float): half the L1 distance, from 0 to 1, mean over the tokens.
    values (dict of list of float): all three for each prediction.
    weights (dict of list of float): its tokens. Means by these weights are the results.
"""
_NAMES = ("forward_kl", "reverse_kl", "total_variation")


class Divergence(evaluate.Metric):
    r"""
    Forward KL, reverse KL and total variation between a model and its teacher, exact over the vocabulary at each state
    that the texts lead through; only the states are sampled. Given references, these are states of the data; given
    what the model wrote, its own.

    With `top_p` below 1 the two are compared as they are sampled from: see [`evaluate_fidelity`].
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=features("predictions", "prompts"),
        )

    def _compute(self, predictions, prompts, model, teacher, tokenizer=None, batch_size=16, top_p=1.0, ended=True):
        student, reader = open_model("model", model, tokenizer)
        # A teacher object comes without a tokenizer: that it reads the same tokens is the caller's word
        teacher, teacher_reader = open_model(
            "teacher", teacher, None if isinstance(teacher, str) else reader.tokenizer
        )
        if teacher_reader.tokenizer.get_vocab() != reader.tokenizer.get_vocab():
            raise ValueError(
                f"`model` and `teacher` have different vocabularies, of {len(reader.tokenizer)} and "
                f"{len(teacher_reader.tokenizer)} tokens, so their distributions cannot be compared token by token. "
                "Take `likelihood` or `imitation_gap`, which need no common vocabulary."
            )
        starts, completions = token_rows(reader, prompts, predictions, ended)
        found = list(compare_rows(student, teacher, starts, completions, batch_size=batch_size, top_p=top_p))
        rows = {name: finite((row[name] for row in found), name) for name in _NAMES}
        tokens = [float(len(ids)) for ids in completions]
        values = {name: [row.mean().item() for row in rows[name]] for name in _NAMES}
        results = {name: weighted_mean(values[name], tokens) for name in _NAMES}
        return results | {"values": values, "weights": dict.fromkeys(_NAMES, tokens)}
