"""What the teacher thinks of a student's texts, against its own."""

import evaluate

from trl_kd.evaluation.metrics.scoring import features, finite, open_model, token_rows
from trl_kd.evaluation.per_token import likelihood_rows


_DESCRIPTION = "Log-likelihood under a teacher of what it writes itself, minus that of what a student writes."
_INPUTS = """
Args:
    predictions (list of str or list of list of int): what the student wrote, as texts or as the teacher's token ids.
    references (list of str or list of list of int): what the teacher wrote for the same prompts, in the same form.
    prompts (list of str or list of list of int): the prompts, in the same form.
    teacher (str or PreTrainedModel): the teacher, or its folder, adapter or Hub name.
    tokenizer (PreTrainedTokenizerBase, optional): needed with a model object.
    batch_size (int, optional, defaults to 16): rows per batch.
    ended (bool, optional, defaults to True): whether texts are complete, so that their EOS counts; token ids are
        taken as they are.
Returns:
    imitation_gap (float): in nats per token.
    values (list of float): influence of each prompt; their mean is `imitation_gap`.
"""


class ImitationGap(evaluate.Metric):
    r"""
    The teacher's log-likelihood per token that is lost where the student writes in its place:

        gap = A / N - B / M,

    with A and N the negative log-likelihood under the teacher, and the tokens, of all that the student wrote, and B
    and M the same of what the teacher wrote. It is 0 in expectation for the teacher itself, and exactly so for its
    own texts. A student that only writes what the teacher finds likely has a negative gap: read it beside the
    entropies. Students of any vocabulary have one, given as texts.

    The gap is a difference of two ratios. With a_i, n_i, b_i and m_i the share of prompt i in A, N, B and M, the
    values v_i = gap + P ((a_i - n_i A / N) / N - (b_i - m_i B / M) / M) are its linearisation; their mean is the gap.

    Note:
        [`evaluate_fidelity`] takes the expectation over each next token in place of the token that was drawn. It
        estimates the same with less noise, but needs the student.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=features("predictions", "references", "prompts"),
        )

    def _compute(self, predictions, references, prompts, teacher, tokenizer=None, batch_size=16, ended=True):
        teacher, reader = open_model("teacher", teacher, tokenizer)
        student_rows, teacher_rows = (
            finite(
                likelihood_rows(teacher, *token_rows(reader, prompts, texts, ended, name), batch_size=batch_size),
                f"The teacher's likelihood of `{name}`",
            )
            for name, texts in (("predictions", predictions), ("references", references))
        )
        student_mean, student_parts = _ratio(student_rows)
        teacher_mean, teacher_parts = _ratio(teacher_rows)
        gap = student_mean - teacher_mean
        values = [gap + ours - theirs for ours, theirs in zip(student_parts, teacher_parts, strict=True)]
        return {"imitation_gap": gap, "values": values}


def _ratio(rows):
    """Nats per token of all rows, and what each row adds to it, times the number of rows."""
    totals, tokens = [row.sum().item() for row in rows], [len(row) for row in rows]
    mean = sum(totals) / sum(tokens)
    scale = len(rows) / sum(tokens)
    return mean, [scale * (total - count * mean) for total, count in zip(totals, tokens, strict=True)]
