"""Knowledge distillation trainers for TRL. Importing the package is instant: a name loads its module on first use."""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0.dev0"

# Public name -> the module that defines it
_MODULES = {
    "AMMConfig": "trl_kd.trainer.amm_config",
    "AMMTrainer": "trl_kd.trainer.amm_trainer",
    "DSKDConfig": "trl_kd.trainer.dskd_config",
    "DSKDTrainer": "trl_kd.trainer.dskd_trainer",
    "KDConfig": "trl_kd.trainer.kd_config",
    "SparseTDConfig": "trl_kd.trainer.sparse_td_config",
    "SparseTDTrainer": "trl_kd.trainer.sparse_td_trainer",
    "Transitions": "trl_kd.trainer.transitions",
}

__all__ = [
    *("AMMConfig", "AMMTrainer", "DSKDConfig", "DSKDTrainer", "KDConfig"),
    *("SparseTDConfig", "SparseTDTrainer", "Transitions", "__version__"),
]

if TYPE_CHECKING:
    from trl_kd.trainer.amm_config import AMMConfig
    from trl_kd.trainer.amm_trainer import AMMTrainer
    from trl_kd.trainer.dskd_config import DSKDConfig
    from trl_kd.trainer.dskd_trainer import DSKDTrainer
    from trl_kd.trainer.kd_config import KDConfig
    from trl_kd.trainer.sparse_td_config import SparseTDConfig
    from trl_kd.trainer.sparse_td_trainer import SparseTDTrainer
    from trl_kd.trainer.transitions import Transitions


def __getattr__(name: str):
    """Load a public name from its module (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the lazy names too, for completion in shells and editors."""
    return sorted({*globals(), *_MODULES})
