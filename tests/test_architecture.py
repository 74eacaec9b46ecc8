"""The shape of the package, enforced: which module may import which, and how large things may grow."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "trl_kd"

# A module imports from its own floor's package and from lower floors. Two packages on one floor do not know each
# other, except where `SIBLINGS` says so.
FLOORS = {
    "losses": 0,
    "modules": 1,
    "data": 2,
    "teachers": 3,
    "generation": 3,
    "checks": 4,
    "evaluation": 5,
    "trainer": 5,
    "callbacks": 5,
    "plots": 5,
    "scripts": 6,
    "cli": 6,
}
# `_compat` is below everything that may use the libraries; `__init__` is the front door, and only the scripts use it.
COMPAT = "_compat"
# The command line starts the scripts, and a teacher writes completions; never the other way round.
SIBLINGS = {("cli", "scripts"), ("teachers", "generation")}

# Loaded inside the function that needs them: they are slow to import, optional, or both.
LAZY_ONLY = {"peft", "matplotlib", "wandb", "trackio", "vllm", "bitsandbytes", "deepspeed", "lm_eval"}

# The only names under `trl.` that count as public beside those of `trl` itself.
PUBLIC_TRL_MODELS = {"unwrap_model_for_generation", "prepare_deepspeed", "prepare_fsdp"}

MAX_FUNCTION_LINES = 60
MAX_TRAINER_LINES = 400
MAX_BASE_TRAINER_LINES = 300


def source_files(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def component(path: Path, package: Path) -> str:
    """`trl_kd/losses/linear.py` -> "losses", `trl_kd/cli.py` -> "cli", `trl_kd/__init__.py` -> "__init__"."""
    return path.relative_to(package).with_suffix("").parts[0]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def runtime_nodes(node: ast.AST, module_level_only: bool = False) -> Iterator[ast.AST]:
    """Walk the tree without `if TYPE_CHECKING:` blocks and, on request, without the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in child.orelse:
                yield statement
                yield from runtime_nodes(statement, module_level_only)
            continue
        yield child
        if module_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield from runtime_nodes(child, module_level_only)


def absolute_module(node: ast.ImportFrom, path: Path, package: Path) -> str:
    """Resolve `from ..losses import x` to `trl_kd.losses`."""
    if node.level == 0:
        return node.module or ""
    parts = path.relative_to(package.parent).with_suffix("").parts
    base = parts[: len(parts) - node.level]
    return ".".join((*base, *((node.module or "").split(".") if node.module else ())))


def imported_names(path: Path, package: Path, module_level_only: bool = False) -> Iterator[tuple[str, int]]:
    """Yield the dotted names a file imports, with their line: `from a.b import c` yields `a.b.c`."""
    for node in runtime_nodes(parse(path), module_level_only):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            module = absolute_module(node, path, package)
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def where(path: Path, package: Path, line: int) -> str:
    return f"{path.relative_to(package.parent)}:{line}"


def check_floors(package: Path) -> list[str]:
    """Imports of the package's own modules point down."""
    found = []
    for path in source_files(package):
        source = component(path, package)
        if source in ("__init__", COMPAT):
            continue
        for name, line in imported_names(path, package):
            parts = name.split(".")
            if parts[0] != "trl_kd":
                continue
            target = parts[1] if len(parts) > 1 else "__init__"
            if target in (source, COMPAT) or (source, target) in SIBLINGS:
                continue
            if target not in FLOORS:
                # `from trl_kd import X`: the front door, for those on the top floor
                if FLOORS[source] < FLOORS["cli"]:
                    found.append(f"{where(path, package, line)} imports {name} from the top of the package")
            elif FLOORS[target] >= FLOORS[source]:
                found.append(f"{where(path, package, line)}: {source} must not import {name}")
    return found


def check_every_file_has_a_floor(package: Path) -> list[str]:
    found = {component(path, package) for path in source_files(package)}
    return sorted(found - set(FLOORS) - {"__init__", COMPAT})


def check_pure_floors(package: Path) -> list[str]:
    """
    `losses` and `modules` need torch and the standard library, nothing else.

    `modules` may take what it needs for quantised and sharded weights from the shims, which load torch only.
    """
    found = []
    for path in source_files(package):
        if component(path, package) not in ("losses", "modules"):
            continue
        for name, line in imported_names(path, package):
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top not in ("torch", "trl_kd"):
                found.append(f"{where(path, package, line)} imports {name}")
            if name.startswith("trl_kd._compat") and component(path, package) == "losses":
                found.append(f"{where(path, package, line)} imports {name}, but a formula has no versions")
    return found


def is_private_upstream(name: str) -> bool:
    parts = name.split(".")
    if parts[0] not in ("trl", "transformers"):
        return False
    if any(part.startswith("_") and part != "__version__" for part in parts[1:]):
        return True
    if parts[0] == "trl":
        if len(parts) == 3 and parts[1] == "models" and parts[2] in PUBLIC_TRL_MODELS:
            return False
        return parts[1:2] in (["experimental"], ["trainer"], ["models"], ["generation"], ["extras"])
    # transformers.trainer, transformers.trainer_utils, transformers.trainer_callback, ...
    return len(parts) > 2 and parts[1].startswith("trainer")


def check_upstream(package: Path) -> list[str]:
    """Names that TRL and Transformers may change without notice are touched in `_compat.py` alone."""
    found = []
    for path in source_files(package):
        is_compat = component(path, package) == COMPAT
        for name, line in imported_names(path, package):
            experimental = name.startswith("trl.experimental")
            if is_private_upstream(name) and not is_compat:
                found.append(f"{where(path, package, line)} imports {name}")
            if is_compat and experimental and (name, line) in set(imported_names(path, package, True)):
                found.append(f"{where(path, package, line)} imports {name} when it is loaded")
    return found


def check_lazy(package: Path) -> list[str]:
    found = []
    for path in source_files(package):
        for name, line in imported_names(path, package, module_level_only=True):
            if name.split(".")[0] in LAZY_ONLY:
                found.append(f"{where(path, package, line)} imports {name} at module level")
    return found


def check_trainers(package: Path) -> list[str]:
    """A trainer knows the shared base, never another method's trainer or config."""
    found = []
    methods = {path.stem.removesuffix("_trainer") for path in (package / "trainer").glob("*_trainer.py")} - {"kd"}
    for path in source_files(package / "trainer"):
        own = path.stem.removesuffix("_trainer").removesuffix("_config")
        for name, line in imported_names(path, package):
            for part in name.split("."):
                method = part.removesuffix("_trainer").removesuffix("_config")
                if path.name != "__init__.py" and method != part and method in methods - {own}:
                    found.append(f"{where(path, package, line)} imports {name}")
    return found


def check_sizes(package: Path) -> list[str]:
    found = []
    for path in source_files(package):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = None
        if path.name == "kd_trainer.py":
            limit = MAX_BASE_TRAINER_LINES
        elif path.stem.endswith("_trainer"):
            limit = MAX_TRAINER_LINES
        if limit is not None and lines > limit:
            found.append(f"{where(path, package, 1)} has {lines} lines; the limit is {limit}")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = code_lines(node)
                if length > MAX_FUNCTION_LINES:
                    found.append(f"{where(path, package, node.lineno)} {node.name} has {length} lines")
    return found


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, the docstring not counted: words are welcome."""
    length = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        length -= first.end_lineno - first.lineno + 1
    return length


CHECKS = [
    check_floors,
    check_every_file_has_a_floor,
    check_pure_floors,
    check_upstream,
    check_lazy,
    check_trainers,
    check_sizes,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_architecture_package_keeps_the_rule(check):
    assert check(PACKAGE) == []


LONG_FUNCTION = "def long():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES + 1)
LONG_FILE = "x = 1\n" * (MAX_TRAINER_LINES + 1)

# One violation of each rule: (check, file, source)
VIOLATIONS = {
    "loss imports a module": (check_floors, "losses/x.py", "from trl_kd.modules import y"),
    "relative import upwards": (check_floors, "losses/x.py", "from ..trainer.kd_config import KDConfig"),
    "import upwards in a function": (check_floors, "data/x.py", "def f():\n    import trl_kd.generation.rollouts"),
    "import upwards by name": (check_floors, "data/x.py", "importlib.import_module('trl_kd.trainer')"),
    "siblings": (check_floors, "generation/x.py", "from trl_kd.teachers import LocalTeacher"),
    "a script imports the command line": (check_floors, "scripts/x.py", "from trl_kd.cli import main"),
    "front door from a lower floor": (check_floors, "trainer/x.py", "from trl_kd import AMMConfig"),
    "a file without a floor": (check_every_file_has_a_floor, "helpers.py", "x = 1"),
    "loss imports transformers": (check_pure_floors, "losses/x.py", "import transformers"),
    "loss imports the shims": (check_pure_floors, "losses/x.py", "from trl_kd import _compat"),
    "module imports numpy in a function": (check_pure_floors, "modules/x.py", "def f():\n    import numpy as np"),
    "experimental": (check_upstream, "trainer/x.py", "def f():\n    from trl.experimental.gkd import GKDTrainer"),
    "experimental from the package": (check_upstream, "trainer/x.py", "from trl import experimental"),
    "experimental when the shims are loaded": (check_upstream, "_compat.py", "import trl.experimental.gkd"),
    "private TRL module": (check_upstream, "trainer/x.py", "from trl.trainer.utils import pad"),
    "TRL's models beyond the public three": (check_upstream, "trainer/x.py", "from trl.models import create_x"),
    "private TRL name": (check_upstream, "trainer/x.py", "from trl.models.utils import _ForwardRedirection"),
    "TRL's generation": (check_upstream, "generation/x.py", "import trl.generation.vllm_generation"),
    "Transformers' trainer module": (check_upstream, "trainer/x.py", "from transformers.trainer_utils import x"),
    "peft at module level": (check_lazy, "trainer/x.py", "from peft import PeftModel"),
    "matplotlib at class level": (check_lazy, "plots.py", "class A:\n    import matplotlib.pyplot as plt"),
    "wandb in a try": (check_lazy, "callbacks.py", "try:\n    import wandb\nexcept ImportError:\n    pass"),
    "trainers know each other": (check_trainers, "trainer/dskd_trainer.py", "from .amm_config import AMMConfig"),
    "the base knows a method": (check_trainers, "trainer/kd_trainer.py", "from trl_kd.trainer import amm_trainer"),
    "long function": (check_sizes, "data/x.py", LONG_FUNCTION),
    "long method": (check_sizes, "data/x.py", "class A:\n" + textwrap.indent(LONG_FUNCTION, "    ")),
    "long trainer": (check_sizes, "trainer/amm_trainer.py", LONG_FILE),
    "long base": (check_sizes, "trainer/kd_trainer.py", "x = 1\n" * (MAX_BASE_TRAINER_LINES + 1)),
}  # fmt: skip

# What the same rules must let through: (check, file, source)
ALLOWED = {
    "down": (check_floors, "trainer/x.py", "from trl_kd.losses import forward_kl\nfrom ..data import formatting"),
    "own package": (check_floors, "losses/x.py", "from .divergences import forward_kl"),
    "shims": (check_floors, "data/x.py", "from trl_kd._compat import y"),
    "types only": (check_floors, "losses/x.py", "if TYPE_CHECKING:\n    from trl_kd.trainer import kd_config"),
    "front door from a script": (check_floors, "scripts/x.py", "from trl_kd import AMMConfig"),
    "torch and the standard library": (check_pure_floors, "losses/x.py", "import math\nimport torch.nn as nn"),
    "module imports from the shims": (check_pure_floors, "modules/x.py", "from trl_kd._compat import y"),
    "public TRL": (check_upstream, "trainer/x.py", "from trl import SFTTrainer\nfrom trl.models import prepare_fsdp"),
    "public Transformers": (check_upstream, "trainer/x.py", "from transformers import TrainerCallback, Trainer"),
    "private in the shims": (check_upstream, "_compat.py", "from trl.trainer.utils import pad"),
    "experimental in a shim": (check_upstream, "_compat.py", "def f():\n    from trl.experimental import gkd"),
    "peft in a function": (check_lazy, "trainer/x.py", "def f():\n    from peft import PeftModel"),
    "own config": (check_trainers, "trainer/amm_trainer.py", "from .amm_config import AMMConfig"),
    "long docstring": (check_sizes, "data/x.py", 'def f():\n    """' + "word\n" * 100 + '    """\n    return 1'),
}  # fmt: skip


def plant(root: Path, file: str, source: str) -> Path:
    """A package with two empty trainers and one file with the given source."""
    package = root / "trl_kd"
    for name in ("trainer/amm_trainer.py", "trainer/dskd_trainer.py", "trainer/kd_trainer.py", file):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    (package / file).write_text(source)
    return package


@pytest.mark.parametrize(("check", "file", "source"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_architecture_violation_is_found(check, file, source, tmp_path):
    assert len(check(plant(tmp_path, file, source))) >= 1


@pytest.mark.parametrize(("check", "file", "source"), ALLOWED.values(), ids=ALLOWED.keys())
def test_architecture_allowed_import_is_not_reported(check, file, source, tmp_path):
    assert check(plant(tmp_path, file, source)) == []


def loaded_modules(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after one statement."""
    program = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(result.stdout.split())


HEAVY = {"torch", "transformers", "trl", "datasets", "peft", "accelerate", "numpy", "pandas", "rich"}


@pytest.mark.parametrize("statement", ["import trl_kd", "import trl_kd.cli", "import trl_kd; dir(trl_kd)"])
def test_import_package_loads_nothing_heavy(statement):
    assert loaded_modules(statement) & HEAVY == set()


@pytest.mark.parametrize("module", ["losses", "modules"])
def test_import_pure_floor_loads_torch_only(module):
    loaded = loaded_modules(f"import trl_kd.{module}")
    assert "torch" in loaded
    # torch itself loads numpy where it is installed
    assert loaded & (HEAVY - {"torch", "numpy"}) == set()


def test_import_unknown_name_is_an_attribute_error():
    import trl_kd

    with pytest.raises(AttributeError, match="module 'trl_kd' has no attribute 'NoSuchTrainer'"):
        _ = trl_kd.NoSuchTrainer


def test_import_every_public_name_resolves():
    import trl_kd

    assert set(trl_kd.__all__) <= set(dir(trl_kd))
    for name in trl_kd.__all__:
        assert getattr(trl_kd, name) is not None
