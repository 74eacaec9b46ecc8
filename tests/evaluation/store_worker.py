"""A process of its own for the tests of the store: started by them, told what to do on its standard input, killed."""

import os
import resource
import sys
import time
import types
from contextlib import contextmanager
from pathlib import Path


if __name__ == "__main__":
    # The package around the store loads torch, which takes longer than a whole test
    package = types.ModuleType("trl_kd.evaluation")
    package.__path__ = [str(Path(__file__).parents[2] / "trl_kd" / "evaluation")]
    sys.modules["trl_kd.evaluation"] = package

from trl_kd.evaluation.store import ModelEntry, ResultStore, Sample  # noqa: E402
from trl_kd.evaluation.store_database import Database  # noqa: E402


PROMPTS = 20


def say(*words: object) -> None:
    print(*words, flush=True)  # noqa: T201


def batch(generation: int, size: int = 20_000) -> list[Sample]:
    """Answers that all name their generation, so that a half-written batch is seen."""
    text = f"{generation} " * (size // len(f"{generation} "))
    return [
        Sample(index, f"prompt {index}", [], text, [], None, True, {"generation": (float(generation), 1.0)}, [])
        for index in range(PROMPTS)
    ]


def begin(store: ResultStore, name: str):
    models = [ModelEntry("student", "student", "path", "weights", "tokenizer")]
    return store.begin("eval", name, {"of": name}, "data", "stories", models, {"trl_kd": "0"})


def main() -> None:
    task, path, name = sys.argv[1:4]
    say("ready")
    sys.stdin.readline()
    store = ResultStore(path)
    run = begin(store, name)
    say(run.id, run.resumed)
    if task == "begin":
        sys.stdin.readline()
    elif task == "fork":
        if os.fork() == 0:
            # Said by the child itself: before it has run, it still has all that its parent had
            say(os.getpid())
            time.sleep(60)
            os._exit(0)
        sys.stdin.readline()
    elif task == "middle":
        run.add_samples("student", 0, batch(1))
        original = Database.write

        @contextmanager
        def write(self):
            with original(self) as connection:
                yield connection
                say("middle")
                time.sleep(60)

        Database.write = write
        # 4 MB: more than SQLite keeps in memory, so that it writes to its log before the end of the transaction
        run.add_samples("student", 0, batch(2, size=200_000))
    elif task == "full":
        run.add_samples("student", 0, batch(1))
        # Python ignores the signal, so that the system refuses the write as it does where a disk is full
        size = os.stat(path).st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100_000, resource.RLIM_INFINITY))
        try:
            run.add_samples("student", 0, batch(2, size=200_000))
        except OSError as error:
            say(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        run.add_results("student", 0, {"after": 1.0})
    else:
        for generation in range(1, int(task) + 1):
            run.add_samples("student", 0, batch(generation))
            run.add_results("student", generation, {"generation": generation})
            say(generation)
        run.finish()


if __name__ == "__main__":
    main()
