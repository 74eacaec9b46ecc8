"""One cell of a bench: a method and a seed, trained, judged on held-out rows, and written whole or not at all."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PrinterCallback, set_seed

from trl_kd.evaluation.models import EvalModel, Reader, library_versions
from trl_kd.evaluation.runner import Evaluation
from trl_kd.evaluation.store import ResultStore, Sample
from trl_kd.evaluation.suite import EvalRow, Suite, digest_of, load_suite, plain_suite, read_rows
from trl_kd.scripts.arguments import load_splits, select_split
from trl_kd.scripts.bench_config import DEMO, STORIES, BenchConfig
from trl_kd.scripts.bench_methods import METHODS, Material
from trl_kd.scripts.stories import make_stories, sum_is_right


# Of the stories to train on, and of those held out
TRAIN_SEED, TEST_SEED = 10, 11


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for file in (folder / "cells").glob("*.partial"):
        file.unlink()


def write_whole(file: Path, value: Any) -> None:
    """Write JSON so that the file has all of it or does not exist, whenever the process ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.partial")
    try:
        with open(unfinished, "w", encoding="utf-8") as stream:
            json.dump(value, stream, allow_nan=False)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a cell holds."""
    found = library_versions()
    for name in ("trl", "accelerate", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def counted_tokens(model: Any) -> Iterator[dict[str, int]]:
    """
    Count the tokens that the student reads in order to be trained: prompt and completion, without padding.

    What it reads while it writes a rollout, or to be looked at, is not counted.
    """
    counts = {"tokens": 0, "forwards": 0}

    def count(module: Any, arguments: tuple, inputs: Mapping[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        mask = inputs.get("attention_mask")
        ids = inputs.get("input_ids", inputs.get("inputs_embeds", arguments[0] if arguments else None))
        is_plain = isinstance(mask, torch.Tensor) and mask.dim() == 2
        counts["tokens"] += int(mask.sum()) if is_plain else ids.shape[0] * ids.shape[1]
        counts["forwards"] += 1

    # Below whatever wraps the forward of the whole model
    hook = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()


class Bench:
    r"""
    What the cells of a bench share: its folder, its models and its rows.

    Args:
        config ([`~trl_kd.scripts.bench_config.BenchConfig`]):
            The bench.
        folder (`str` or `Path`):
            Where everything that is made is kept.
    """

    def __init__(self, config: BenchConfig, folder: str | Path):
        self.config, self.folder = config, Path(folder)

    @property
    def student_path(self) -> str:
        """The student that all methods start from."""
        if self.config.student == DEMO or self.config.warm_start["steps"]:
            return str(self.folder / "student")
        return self.config.student

    @property
    def source(self) -> str:
        """Where the student's tokenizer, and its ends of text, come from."""
        return self.config.teacher_path if self.config.student == DEMO else self.config.student

    @cached_property
    def tokenizer(self) -> Any:
        """The student's."""
        return AutoTokenizer.from_pretrained(self.source)

    @cached_property
    def same_vocabulary(self) -> bool:
        """Whether teacher and student read the same tokens."""
        return AutoTokenizer.from_pretrained(self.config.teacher_path).get_vocab() == self.tokenizer.get_vocab()

    @cached_property
    def suite(self) -> Suite:
        """How rows are read and students judged."""
        config = self.config
        changes = {name: value for name, value in config.evaluation.items() if name != "batch_size"}
        changes |= {"max_completion_length": config.max_completion_length}
        changes |= {"max_prompt_length": config.max_prompt_length}
        suite = plain_suite(changes) if config.template is None else load_suite(config.template, changes)
        if len(suite.seeds) != 1:
            raise ValueError(
                f"`seeds` of the evaluation is {list(suite.seeds)}, but a cell has one draw for each prompt: its own "
                "seeds are those of training. Give one, as in `evaluation: {seeds: [0]}`."
            )
        return suite

    def _read(self, part: str) -> list[EvalRow]:
        """Rows of `"train"` or `"test"` as prompts and references."""
        config = self.config
        count = config.train_rows if part == "train" else config.test_rows
        if config.data == STORIES:
            rows = make_stories(count, TRAIN_SEED if part == "train" else TEST_SEED)
        else:
            split = config.train_split if part == "train" else config.test_split
            rows = select_split(load_splits(config.data, config.data_config), split, f"{part}_split")
        found = read_rows(rows, self.suite, count)
        if not found[0].references:
            raise ValueError(
                f"The rows of `{config.data}` have no references, so there is nothing to fine-tune on and to compare "
                "with. Name a dataset that has some, or a `template` that finds them."
            )
        return found

    @cached_property
    def read(self) -> dict[str, list[EvalRow]]:
        """Both splits."""
        return {part: self._read(part) for part in ("train", "test")}

    @cached_property
    def train_rows(self) -> dict[str, Dataset]:
        """What students are trained on, in the forms of [`Material`]."""
        config, forms = self.config, {"rows": [], "marked": [], "texts": [], "prompts": []}
        reader = Reader(self.source, self.tokenizer, self.suite.chat)
        for row in self.read["train"]:
            prompt, completion = reader.answer(row, row.references[0])
            if config.max_prompt_length is not None and len(prompt) > config.max_prompt_length:
                continue
            completion = completion[: config.max_completion_length]
            ids, text, answer = prompt + completion, row.prompt, reader.text(prompt, completion)
            if self.suite.chat and isinstance(text, str):
                text = [{"role": "user", "content": text}]
            answer = answer if isinstance(text, str) else [{"role": "assistant", "content": answer}]
            mask = [0] * len(prompt) + [1] * len(completion)
            forms["rows"].append({"input_ids": ids, "labels": [-100] * len(prompt) + completion})
            # GKD and GOLD read the prompt only for its presence: the mask says where it ends
            forms["marked"].append({"prompt": row.text, "input_ids": ids, "completion_mask": mask})
            forms["texts"].append({"prompt": text, "completion": answer})
            forms["prompts"].append({"prompt": text})
        if not forms["rows"]:
            raise ValueError(
                f"All prompts are longer than `max_prompt_length` ({config.max_prompt_length} tokens), so none is "
                "left to train on. Raise it."
            )
        return {name: Dataset.from_list(rows) for name, rows in forms.items()}

    @cached_property
    def _digests(self) -> dict[str, str]:
        """Of what the settings only name."""
        teacher = EvalModel("teacher", self.config.teacher_path).entry()
        rows = {f"{part} rows": digest_of(rows) for part, rows in self.read.items()}
        return rows | {"teacher": teacher.weights, "teacher's tokenizer": teacher.tokenizer}

    def identity_of(self, name: str) -> dict[str, Any]:
        """Settings of a cell, and digests and versions of what they do not say."""
        identity = self.config.settings_of(name) | self._digests | {"versions": versions()}
        if name != "teacher":
            identity["student's weights"] = self._student_weights
        return json.loads(json.dumps(identity))

    @cached_property
    def _student_weights(self) -> str:
        return EvalModel("before", self.student_path).entry().weights

    # What is made once

    def make_student(self) -> None:
        """Fine-tune the student that all methods start from, if that has not been done."""
        config, folder = self.config, self.folder / "student"
        if self.student_path != str(folder):
            return
        names = ("student", "student_size", "warm_start", "batch_size", "training", "max_prompt_length")
        names += ("max_completion_length", "device", "threads")
        settings = {name: getattr(config, name) for name in names} | self._digests | {"versions": versions()}
        for name in ("teacher", "test rows"):  # they play no part in it
            del settings[name]
        settings = json.loads(json.dumps(settings))
        made_by = folder / "warm_start.json"
        if made_by.exists():
            check_unchanged(folder, json.loads(made_by.read_text(encoding="utf-8")), settings)
            return
        unfinished = self.folder / "student.partial"
        shutil.rmtree(unfinished, ignore_errors=True)
        self._fine_tune(str(unfinished))
        write_whole(unfinished / "warm_start.json", settings)
        unfinished.replace(folder)

    def _fine_tune(self, folder: str) -> None:
        """A new student, or the one that was named, after `warm_start`."""
        config, options, student = self.config, dict(self.config.warm_start), self.config.student
        steps = options.pop("steps")
        if student == DEMO:
            student = folder
            set_seed(0)
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(self.tokenizer),
                    tie_word_embeddings=True,
                    bos_token_id=self.tokenizer.bos_token_id,
                    eos_token_id=self.tokenizer.eos_token_id,
                    pad_token_id=self.tokenizer.pad_token_id,
                    **config.student_size,
                )
            ).save_pretrained(folder)
        if steps:
            with TemporaryDirectory() as scratch:
                arguments = self.arguments(scratch, seed=0) | {"max_steps": steps}
                trainer = METHODS["sft"].trainer(self.material(student), arguments, options)
                trainer.remove_callback(PrinterCallback)
                trainer.train()
            trainer.save_model(folder)
        self.tokenizer.save_pretrained(folder)

    # One cell

    def material(self, student: str) -> Material:
        """What a method is given."""
        config = self.config
        return Material(
            student=student,
            teacher=config.teacher_path,
            tokenizer=self.tokenizer,
            same_vocabulary=self.same_vocabulary,
            max_completion_length=config.max_completion_length,
            lmbda=config.lmbda,
            **self.train_rows,
        )

    def arguments(self, folder: str, seed: int) -> dict[str, Any]:
        """Training arguments that all methods share."""
        config = self.config
        fixed = {
            "output_dir": folder,
            "seed": seed,
            "max_steps": config.steps,
            "per_device_train_batch_size": config.batch_size,
            "logging_steps": max(1, config.steps // 15),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": config.device == "cpu",
            "dataloader_pin_memory": False,
        }
        if config.device == "cpu":
            fixed |= {"bf16": False, "gradient_checkpointing": False}
        return fixed | config.training

    def check_options(self, method: str) -> None:
        """Find a mistyped option before any work is done."""
        METHODS[method].check_options(self.config.training | self.config.method_options.get(method, {}))

    def train(self, method: str, seed: int) -> tuple[Any, dict[str, Any]]:
        """The trained student of a method and a seed, and what its training took."""
        with TemporaryDirectory(prefix="trl-kd-bench-") as scratch:
            options = self.config.method_options.get(method, {})
            trainer = METHODS[method].trainer(self.material(self.student_path), self.arguments(scratch, seed), options)
            # The log is kept in the cell; printed, those of several processes would mix
            trainer.remove_callback(PrinterCallback)
            model = trainer.accelerator.unwrap_model(trainer.model)
            with counted_tokens(model) as counts:
                start = time.perf_counter()
                trainer.train()
                seconds = time.perf_counter() - start
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        return model, {
            "steps": trainer.state.global_step,
            "seconds": seconds,
            "student_tokens": counts["tokens"],
            "loss": log[-1]["loss"],
            "log": trainer.state.log_history,
        }

    def judge(self, model: Any, teacher_samples: Sequence[Sample] | None) -> tuple[list[Sample], dict[str, Any]]:
        """What a model writes on the held-out prompts, with its measures; the teacher's own if there are none yet."""
        models = [EvalModel("teacher", self.config.teacher_path, role="teacher")]
        if teacher_samples is not None:
            models.append(EvalModel("student", model, tokenizer=self.tokenizer))
        batch_size = self.config.evaluation.get("batch_size", 16)
        task = Evaluation(
            models, self.read["test"], self.suite, self.config.data, batch_size=batch_size, progress=False
        )
        (seed,) = self.suite.seeds
        with TemporaryDirectory(prefix="trl-kd-bench-") as scratch:
            with task.begin(ResultStore(Path(scratch) / "cell.sqlite")) as run:
                if teacher_samples is not None:
                    # What is there is not made again
                    run.add_samples("teacher", seed, teacher_samples)
                task.run(run)
                samples = run.samples(task.models[-1].name, seed)
        if self.config.data == STORIES:
            for sample in samples:
                sample.values["sums_right"] = (100.0 * sum_is_right(sample.prompt, sample.completion), 1.0)
        entry = task.models[-1].entry()
        return samples, {"weights": entry.weights, "tokenizer": entry.tokenizer, "parameters": entry.parameters}


def check_unchanged(file: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on from what was made with other settings."""
    changed = {key: (there.get(key), now.get(key)) for key in sorted({*there, *now})}
    changed = {key: pair for key, pair in changed.items() if pair[0] != pair[1]}
    if changed:
        listed = ", ".join(f"`{key}` was {was!r} and is now {value!r}" for key, (was, value) in changed.items())
        raise ValueError(
            f"{file} was made with other settings: {listed}. One table cannot mix them. Choose another "
            "`--output_dir`, or remove what is there."
        )


def read_samples(cell: Mapping[str, Any]) -> list[Sample]:
    """Samples of a finished cell."""
    return [
        Sample(**(sample | {"values": {name: tuple(pair) for name, pair in sample["values"].items()}}))
        for sample in cell["samples"]
    ]


def run_cell(bench: Bench, name: str, seed: int | None, file: Path) -> None:
    r"""
    Make one cell: train, judge, write.

    Args:
        bench ([`Bench`]):
            What cells share.
        name (`str`):
            Method, `"teacher"` or `"before"`.
        seed (`int`, *optional*):
            Seed of training.
        file (`Path`):
            Where the cell is written.
    """
    identity, training = bench.identity_of(name), None
    if name == "teacher":
        samples, facts = bench.judge(None, None)
    else:
        if name == "before":
            model = AutoModelForCausalLM.from_pretrained(bench.student_path)
        else:
            model, training = bench.train(name, seed)
        teacher = json.loads((file.parent / "teacher.json").read_text(encoding="utf-8"))
        samples, facts = bench.judge(model, read_samples(teacher))
    cell = {"name": name, "seed": seed, "settings": identity, "training": training, "model": facts}
    write_whole(file, cell | {"samples": [asdict(sample) for sample in samples]})
