"""What is worth a word about a run of dual-space distillation: settings before it, projectors during it."""

from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Log entries before a projector that is behind is worth a word
_PATIENCE = 3


def warn_of_settings(args: Any) -> None:
    r"""
    Warn of settings that work and are likely a mistake.

    Args:
        args ([`DSKDConfig`]):
            Configuration, resolved.
    """
    if args.lmbda == 1.0 and args.kd_rate < 1.0:
        logger.warning(
            f"`lmbda` is 1, so every row is a rollout, and there is no reference text for the cross-entropy, which "
            f"`kd_rate` {args.kd_rate} asks for. Lower `lmbda` to keep reference rows, or set `kd_rate=1.0`."
        )
    if args.objective != "dual_space":
        return
    if args.aux_learning_rate < 5 * args.learning_rate:
        logger.warning(
            f"`aux_learning_rate` is {args.aux_learning_rate:g} with a `learning_rate` of {args.learning_rate:g}. A "
            "projector that learns no faster than the student teaches it what it has not learned itself. Set it to 5 "
            "to 15 times the student's, or to None for ten times."
        )


class AgreementWatch(TrainerCallback):
    """
    Warns while the projected teacher finds the labels less well than the student does, and tells when it leads.

    It needs no state: a resumed run has the log of the whole run.
    """

    def __init__(self):
        self._warned = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = ("kd/off_policy/projector_agreement", "kd/off_policy/student_agreement")
        entries = [entry for entry in state.log_history if all(name in entry for name in names)]
        if not entries or names[0] not in (logs or {}):
            return
        projector, student = (entries[-1][name] for name in names)
        if projector < student and len(entries) >= _PATIENCE and not self._warned:
            self._warned = True
            logger.warning(
                f"After {state.global_step} steps the projected teacher finds {projector:.0%} of its labels, the "
                f"student {student:.0%}: the projector is behind the student, who is drawn towards its errors. "
                "Raise `aux_learning_rate`, or start from `projector_init='logit_invariant'` (`preset='v2'`)."
            )
        elif projector >= student and self._warned:
            self._warned = False
            logger.info(f"After {state.global_step} steps the projected teacher ({projector:.0%}) leads the student.")
