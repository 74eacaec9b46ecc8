"""Whether two models speak of the same tokens, and how many of them."""

from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)


def shared_vocab_size(
    student_size: int, teacher_size: int, student_tokenizer: Any, teacher_tokenizer: Any | None
) -> int:
    r"""
    Number of tokens that the heads of student and teacher share.

    Heads are often padded to different sizes over one tokenizer (Qwen2.5: 151,936 and 152,064); such heads are cut.

    Args:
        student_size (`int`):
            Rows of the student's head.
        teacher_size (`int`):
            Rows of the teacher's head.
        student_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The teacher's tokenizer, if it is known.

    Returns:
        `int`

    Raises:
        ValueError: If the tokenizers differ, or the heads differ and the teacher's tokenizer is unknown.
    """
    advice = "Use a teacher with the student's tokenizer, or DSKDTrainer with `alignment='auto'`, which takes any."
    shared = min(student_size, teacher_size)
    student_vocab = student_tokenizer.get_vocab()
    if teacher_tokenizer is None:
        if student_size != teacher_size:
            raise ValueError(
                f"The student's head has {student_size} rows, the teacher's {teacher_size}, and the teacher has no "
                "tokenizer beside it to show that both count the same tokens. The loss compares the two models token "
                f"by token. Save the tokenizer in the teacher's folder. {advice}"
            )
        logger.warning(
            "The teacher has no tokenizer beside it; that its tokens are the student's is taken for granted. Save the "
            "tokenizer in the teacher's folder to have it checked."
        )
    elif student_vocab != (teacher_vocab := teacher_tokenizer.get_vocab()):
        same = len(student_vocab.items() & teacher_vocab.items())
        if only := sorted(student_vocab.keys() - teacher_vocab.keys(), key=student_vocab.get)[:3]:
            advice = (
                f"Only the student has {', '.join(map(repr, only))}: a token that was added for padding is not "
                f"needed, set `pad_token` to one that both have. {advice}"
            )
        raise ValueError(
            f"The vocabularies differ: the student's tokenizer has {len(student_vocab)} tokens, the teacher's "
            f"{len(teacher_vocab)}, and {same} of them have the same id. The loss compares the two models token by "
            f"token. {advice}"
        )
    _check_no_token_is_lost(student_tokenizer, student_size, shared)
    if student_size != teacher_size:
        logger.info(
            f"Heads of {student_size} (student) and {teacher_size} (teacher) rows are cut to the {shared} that they "
            "share."
        )
    return shared


def tokens_beyond(tokenizer: Any, student_size: int, shared: int) -> tuple[list[str], list[str]]:
    r"""
    Tokens of a tokenizer for which the shared rows of two heads have no place.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        student_size (`int`):
            Rows of the student's head.
        shared (`int`):
            Rows that both heads have.

    Returns:
        `tuple[list[str], list[str]]`: tokens that would be lost; and added ones that the student has no row for to
        begin with, so that nothing is lost with them. (Gemma 3 counts an image token that its text models have no row
        for.)
    """
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= shared}
    rowless = {token for token, index in beyond.items() if index >= student_size} & set(tokenizer.get_added_vocab())
    return sorted(beyond.keys() - rowless, key=beyond.get), sorted(rowless, key=beyond.get)


def _check_no_token_is_lost(tokenizer: Any, student_size: int, shared: int) -> None:
    """Refuse a cut through the tokens that texts are written with; say which ones have no row to begin with."""
    lost, rowless = tokens_beyond(tokenizer, student_size, shared)
    if lost:
        raise ValueError(
            f"The tokenizer has ids up to {max(tokenizer.get_vocab().values())}, but the smaller head has {shared} "
            f"rows, so {', '.join(map(repr, lost[:3]))} could never be learned. Resize the embeddings of the smaller "
            "model to the tokenizer."
        )
    if rowless:
        logger.warning(
            f"The student has no row for {', '.join(map(repr, rowless[:3]))}, which its tokenizer adds: a text with "
            "such a token would fail. Keep it out of the data."
        )
