"""Configurations of models by name, also where the Hub cannot be reached."""

import os
from copy import deepcopy
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)


def config_of(name_or_path: str, **source: Any) -> PreTrainedConfig:
    r"""
    Configuration of a model, from its folder, the Hub, or the table that comes with this package.

    The table is asked where the Hub cannot be reached, or refuses (some models ask for a token). Its figures, with
    their sources, are in `trl_kd/checks/architectures.yaml`.

    Args:
        name_or_path (`str`):
            Folder or Hub name of the model.
        source (`Any`):
            Further arguments of [`~transformers.AutoConfig.from_pretrained`], such as `revision` or `token`.

    Returns:
        [`~transformers.PreTrainedConfig`]

    Raises:
        ValueError: If there is no such configuration, neither there nor in the table.

    Examples:

    ```python
    >>> config_of("Qwen/Qwen3-0.6B").hidden_size
    1024
    ```
    """
    try:
        return AutoConfig.from_pretrained(name_or_path, **source)
    except (OSError, ValueError) as error:
        if os.path.isdir(name_or_path):
            raise ValueError(
                f"The folder `{name_or_path}` has no configuration that can be read ({_first_line(error)}), so "
                "nothing is known of its model. Pass the folder of a saved model, with its `config.json`."
            ) from error
        if isinstance(error, ValueError):  # the Hub did answer
            raise
        if name_or_path not in known_models():
            raise ValueError(
                f"The configuration of `{name_or_path}` cannot be loaded ({_first_line(error)}), and the table has "
                "none of this name, so nothing is known of the model. Check the name and the connection, pass a "
                f"folder with its `config.json`, or use one of {', '.join(known_models())}."
            ) from error
    logger.info(f"The Hub did not give the configuration of `{name_or_path}`: it is taken from trl_kd's table.")
    fields = deepcopy(known_models()[name_or_path])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.name_or_path = name_or_path
    return config


@cache
def known_models() -> dict[str, dict[str, Any]]:
    r"""
    The table of [`config_of`].

    Returns:
        `dict[str, dict[str, Any]]`: fields of the configuration, `model_type` among them, by Hub name.
    """
    return {name: model["config"] for model in table()["models"] for name in model["names"]}


@cache
def table() -> dict[str, Any]:
    r"""
    The whole file: addresses of the sources, and the models with their names, figures and where these were read.

    Returns:
        `dict[str, Any]`
    """
    return yaml.safe_load(files("trl_kd.checks").joinpath("architectures.yaml").read_text(encoding="utf-8"))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
