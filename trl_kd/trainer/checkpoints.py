"""Which checkpoints are complete. The marker is the last file of a save; a save that was killed has none."""

import json
import os
import re
from collections.abc import Callable
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from trl_kd._compat import rotate_checkpoints


logger = logging.get_logger(__name__)

MARKER = "trl_kd_complete.json"
_FOLDER = re.compile(r"^checkpoint-(\d+)$")
_REPOSITORY = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")
_ON_HUB = "last-checkpoint"


def is_complete(folder: str) -> bool:
    """Whether a save into `folder` came to its end."""
    return os.path.isfile(os.path.join(folder, MARKER))


def mark(folder: str, step: int) -> None:
    """Declare the save into `folder` complete."""
    path = os.path.join(folder, MARKER)
    with open(path + ".tmp", "w") as file:
        json.dump({"global_step": step}, file)
    os.replace(path + ".tmp", path)


def unmark(folder: str) -> None:
    """Take the declaration back, before files in `folder` are overwritten."""
    if is_complete(folder):
        os.remove(os.path.join(folder, MARKER))


def save_whole(trainer: Any, folder: str, save: Callable[[], None]) -> None:
    r"""
    Save a checkpoint by `save`, then declare it complete, and only then delete older ones.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer.
        folder (`str`):
            The checkpoint.
        save (`Callable`):
            Writes everything.
    """
    args = trainer.args
    limit, args.save_total_limit = args.save_total_limit, None
    if args.should_save:
        unmark(folder)
    try:
        save()
    finally:
        args.save_total_limit = limit
    if args.save_only_model:  # `load_best_model_at_end` needs the auxiliary modules all the same
        trainer.save_state_to(folder)
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        mark(folder, trainer.state.global_step)
        rotate_checkpoints(os.path.dirname(folder), limit, trainer.state.best_model_checkpoint)


def _download(name: str, token: str | None) -> str:
    """The newest checkpoint that a run has pushed to the Hub (`hub_strategy="checkpoint"`)."""
    try:
        folder = snapshot_download(name, allow_patterns=f"{_ON_HUB}/*", token=token)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(
            f"`resume_from_checkpoint` is `{name}`, which is neither a folder nor a repository on the Hub that can be "
            f"read: {error} Name a checkpoint of this run, or pass True to take the newest complete one."
        ) from error
    return os.path.join(folder, _ON_HUB)


def resolve(resume_from_checkpoint: str | bool | None, args: Any) -> str | None:
    r"""
    The checkpoint to resume from.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*):
            A folder; the name of a repository on the Hub, whose `last-checkpoint` is downloaded; or `True` (or
            `"true"`, as on a command line) for the newest complete checkpoint of the output folder.
        args ([`KDConfig`]):
            Configuration, with the output folder and perhaps a token for the Hub.

    Returns:
        `str`, or `None` to start from the beginning.

    Raises:
        ValueError: If the named checkpoint is missing or partial, or none is complete.
    """
    if not resume_from_checkpoint:
        return None
    if str(resume_from_checkpoint).lower() != "true":
        folder = str(resume_from_checkpoint)
        if not os.path.isdir(folder) and _REPOSITORY.match(folder):
            folder = _download(folder, args.hub_token)
        if not os.path.isdir(folder):
            raise ValueError(
                f"`resume_from_checkpoint` is `{folder}`, which is not a folder. Name a checkpoint of this run, or "
                "pass True to take the newest complete one."
            )
        if not is_complete(folder):
            raise ValueError(
                f"The checkpoint `{folder}` is partial: it has no `{MARKER}`, which is written when a save is done, "
                "so weights, optimizer or random states may be missing. Pass `resume_from_checkpoint=True` to take "
                "the newest complete checkpoint."
            )
        return folder
    output_dir = args.output_dir
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = sorted((int(match.group(1)), name) for name in names if (match := _FOLDER.match(name)))
    folders = [os.path.join(output_dir, name) for _, name in steps]
    complete = [folder for folder in folders if is_complete(folder)]
    if not complete:
        raise ValueError(
            f"`{output_dir}` has no complete checkpoint to resume from (partial ones: {len(folders)}). Start without "
            "`resume_from_checkpoint`."
        )
    if partial := [os.path.basename(folder) for folder in folders[folders.index(complete[-1]) + 1 :]]:
        logger.warning(
            f"Resuming from `{complete[-1]}`: {', '.join(partial)} came after it, but its save was cut off."
        )
    return complete[-1]
