"""What can be known of a run from its tokenizers and its rows alone, without a model."""

from trl_kd.checks import alignment, ends, rows, templates, vocabulary
from trl_kd.checks.finding import Finding
from trl_kd.checks.subject import Subject


def text_findings(subject: Subject) -> list[Finding]:
    r"""
    What tokenizers and rows tell about a run.

    Args:
        subject ([`Subject`]):
            The run.

    Returns:
        `list[Finding]`: data, vocabularies, special ids, end of a completion, padding, chat templates, thinking mode,
        truncation, unusable rows, room for completions, the teacher's context, and alignment; what does not concern
        the run is left out.
    """
    found = [vocabulary.vocabulary_finding(subject), vocabulary.special_ids_finding(subject)]
    sample = rows.prepare(subject)
    found = [rows.data_finding(subject, sample), *found]
    if not subject.rows:
        return found
    if not sample.error:
        found += [ends.end_finding(subject, sample), ends.pad_finding(subject, sample)]
    found += [templates.template_finding(subject, sample), templates.thinking_finding(subject)]
    if not sample.error:
        found += [rows.truncation_finding(subject, sample), rows.dropped_finding(subject, sample)]
        found += rows.room_findings(subject, sample)
        found += alignment.alignment_findings(subject, sample)
    return found
