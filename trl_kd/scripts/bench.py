"""
Compares methods at equal tokens: each trains the same student with the same teacher, rows and steps, under several
seeds, and is judged on held-out rows. Everything is in one YAML file; without one, the teacher that ships with the
package teaches stories that are made on the spot.

```bash
trl-kd bench --output_dir out/bench
trl-kd bench --config bench.yaml --output_dir out/bench --methods sft jsd amm --seeds 0 1 2
```

A finished cell (a method and a seed) is a file in `cells/` and is not repeated: a run that was cut off goes on. The
tables go to the terminal and to `results.md`. One machine, one rank per cell.
"""

import os
import shlex
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_kd.scripts.arguments import HelpFormatter


if TYPE_CHECKING:
    from rich.console import Console

    from trl_kd.scripts.bench_cells import Bench
    from trl_kd.scripts.bench_config import BenchConfig, Cell


# What a worker process keeps from cell to cell
_BENCH: "list[Bench]" = []


def _end_with_parent() -> None:
    """Leave when the main process is gone: a killed process takes no leave of its workers."""
    wait([parent_process().sentinel])
    os._exit(1)


def _start_worker(config: "BenchConfig", folder: str, is_process: bool) -> None:
    """Set up the process that makes cells, and quiet its libraries."""
    if is_process:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    import logging
    import warnings

    import datasets
    import torch
    import transformers

    from trl_kd.scripts.bench_cells import Bench

    # TRL says of each experimental trainer that it is one
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _BENCH[:] = [Bench(config, folder)]


def _prepare(cells: "Sequence[Cell]") -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Make the student; the reasons against methods, and what each cell must have been made with."""
    from trl_kd.scripts.bench_config import BEFORE, TEACHER
    from trl_kd.scripts.bench_methods import METHODS

    (bench,) = _BENCH
    methods = dict.fromkeys(cell.name for cell in cells if cell.name in METHODS)
    reasons = {name: METHODS[name].reason_against(bench.same_vocabulary) for name in methods}
    reasons = {name: reason for name, reason in reasons.items() if reason is not None}
    for name in methods:
        if name not in reasons:
            bench.check_options(name)
    bench.make_student()
    names = [TEACHER, BEFORE, *(name for name in methods if name not in reasons)]
    return reasons, {name: bench.identity_of(name) for name in names}


def _make(cell: "Cell") -> "Cell":
    """Make one cell."""
    from trl_kd.scripts.bench_cells import run_cell

    (bench,) = _BENCH
    run_cell(bench, cell.name, cell.seed, cell.file(bench.folder))
    return cell


class _InProcess(Executor):
    """Runs each job when it is submitted, in this process."""

    def submit(self, function: Callable, *arguments: Any, **options: Any) -> Future:
        future = Future()
        future.set_result(function(*arguments, **options))
        return future


@contextmanager
def _workers(config: "BenchConfig", folder: str, number: int) -> Iterator[Executor]:
    """Processes that make cells, each for as long as the bench runs."""
    if number == 1:
        _start_worker(config, folder, False)
        yield _InProcess()
        return
    pool = ProcessPoolExecutor(
        number, get_context("spawn"), initializer=_start_worker, initargs=(config, folder, True)
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ValueError(
            "A process that made a cell is gone: it was killed, or the machine ran out of memory. The finished cells "
            "are kept. Start the same command again, with fewer `--workers` if memory was short."
        ) from error
    finally:
        # The cells that are being made come to their end
        pool.shutdown(cancel_futures=True)


def _unfinished(cells: "Sequence[Cell]", folder: Path, settings: dict[str, dict[str, Any]]) -> "list[Cell]":
    """Cells that have no result yet; those that have one must have been made with the same settings."""
    import json

    from trl_kd.scripts.bench_cells import check_unchanged, remove_unfinished

    remove_unfinished(folder)
    missing = []
    for cell in cells:
        file = cell.file(folder)
        if file.exists():
            check_unchanged(file, json.loads(file.read_text(encoding="utf-8"))["settings"], settings[cell.name])
        else:
            missing.append(cell)
    return missing


def run_bench(
    config: "BenchConfig", folder: Path, workers: int, console: "Console"
) -> "tuple[list[Cell], dict[str, str]]":
    r"""
    Make all cells that are not there.

    Args:
        config ([`~trl_kd.scripts.bench_config.BenchConfig`]):
            The bench.
        folder (`Path`):
            Where everything is kept.
        workers (`int`):
            Processes that make cells at the same time.
        console ([`~rich.console.Console`]):
            Where progress is shown.

    Returns:
        `tuple[list[Cell], dict[str, str]]`: the cells, and why methods are not among them.

    Raises:
        ValueError: If cells that are there were made with other settings, or one cannot be made.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from trl_kd.scripts.bench_config import BEFORE, TEACHER, Cell

    # Seed by seed: a table of all methods can be made early
    cells = [Cell(name, seed) for seed in config.seeds for name in config.methods]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _workers(config, str(folder), workers) as pool, Progress(*columns, console=console) as progress:
        bar = progress.add_task("Preparing the student", total=None)
        reasons, settings = pool.submit(_prepare, cells).result()
        cells = [Cell(TEACHER), Cell(BEFORE), *(cell for cell in cells if cell.name not in reasons)]
        missing = _unfinished(cells, folder, settings)
        progress.update(bar, description="Judging the teacher", total=len(cells), completed=len(cells) - len(missing))
        if missing and missing[0] == Cell(TEACHER):
            # The others are compared with what it wrote
            pool.submit(_make, missing.pop(0)).result()
            progress.advance(bar)
        progress.update(bar, description="Cells")
        if workers == 1:
            finished: Iterator[Any] = map(_make, missing)
        else:
            finished = (future.result() for future in as_completed([pool.submit(_make, cell) for cell in missing]))
        for cell in finished:
            progress.update(bar, description=f"Cells, the last {cell.key}", advance=1)
    return cells, reasons


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """One bench at a time in a folder."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "bench.lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"Another process makes cells in {folder}, and two would make the same. Wait for it, or choose another "
            "`--output_dir`."
        ) from None


def make_parser(prog: str | None) -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog=prog, description=__doc__.replace("```bash\n", "").replace("```\n", ""), formatter_class=HelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", help="YAML file of the bench (default: the one that ships with the package)")
    parser.add_argument("--output_dir", default="out/bench", help="folder of the student, the cells and the table")
    parser.add_argument("--methods", nargs="+", help="methods to compare, in place of those of the file")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds of training, in place of those of the file")
    parser.add_argument("--workers", type=int, default=2, help="processes that make cells at the same time")
    parser.add_argument("--store", help="file of results that the bench is added to, as `trl-kd eval` has it")
    return parser


def run(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the command line, make the cells and the table."""
    parser = make_parser(prog)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(arguments)
    try:
        if args.workers < 1:
            raise ValueError(f"`--workers` is {args.workers}, but someone has to make the cells. Set it to 1 or more.")
        if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise ValueError(
                f"The bench was started on {ranks} ranks, but each cell runs on one: TRL's GKD divides its loss by "
                "the number of ranks. Start it without a launcher, with `--workers` for several cells at a time."
            )
        _run(args, f"{parser.prog} {shlex.join(arguments)}")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _run(args: Any, command: str) -> None:
    from rich.console import Console

    from trl_kd.scripts.bench_config import DEFAULT_CONFIG, DEMO, STORIES, load_config

    config = load_config(args.config or DEFAULT_CONFIG, methods=args.methods, seeds=args.seeds)
    if (config.teacher, config.student, config.data) == (DEMO, DEMO, STORIES):
        # Read by the libraries when they are imported: nothing here has a name on the Hub
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console()
    # Narrower, the columns of the tables would be cut
    console.width = max(console.width, 160)
    folder = Path(args.output_dir)
    with _only_one(folder):
        if args.store is not None:
            from trl_kd.evaluation.store import ResultStore

            ResultStore(args.store)  # better refused now than after all cells
        cells, reasons = run_bench(config, folder, args.workers, console)

        from trl_kd.scripts.bench_table import Results, add_to_store

        results = Results.read(config, folder, cells, reasons, command)
        (folder / "results.md").write_text(results.markdown(), encoding="utf-8")
        results.show(console)
        if args.store is not None:
            run_id = add_to_store(args.store, results)
            console.print(f"Run {run_id} of {args.store}", highlight=False)
    console.print(f"Written: {folder / 'results.md'}", highlight=False)


if __name__ == "__main__":
    run()
