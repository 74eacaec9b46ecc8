"""What `trl-kd check` looks at, in the order of what it costs."""

import copy
import os
from collections.abc import Callable
from itertools import islice
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from trl_kd.scripts.check_plan import planned_run, teacher_names, teacher_source


if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ScriptArguments

    from trl_kd import KDConfig
    from trl_kd.checks.finding import Finding
    from trl_kd.scripts.check import CheckArguments


class Check:
    """One run of the command: what is found, and what keeps the models from being loaded."""

    def __init__(self, method: str, script_args, training_args, model_args, dataset_args, args: "CheckArguments"):
        self.method, self.args = method, args
        self.script_args, self.training_args = script_args, training_args
        self.model_args, self.dataset_args = model_args, dataset_args
        self.findings: list[Finding] = []
        self.reasons: list[str] = []  # why the models are not loaded
        self.configs: dict[str, Any] = {}  # of student and teacher, those that could be read

    def run(self) -> "list[Finding]":
        """All that can be looked at, in the order of what it costs."""
        from trl_kd.scripts.training import set_model_init_kwargs

        set_model_init_kwargs(self.training_args, self.model_args)
        self.safely("memory", self.plan)
        if self.args.plan_only:
            return self.findings
        rows, features, num_rows = self.read_rows()
        self.safely("tokenizers", lambda: self.look_at_text(rows))
        if any(finding.verdict == "stop" for finding in self.findings):
            self.reasons.append("something above says stop")
        if self.reasons:
            self.add("models", "careful", _NOT_LOADED.format("; ".join(dict.fromkeys(self.reasons))), _AGAIN)
        else:
            self.safely("models", lambda: self.look_at_models(rows, features, num_rows))
        return self.findings

    def safely(self, name: str, look: Callable[[], None]) -> None:
        """A check that fails itself says so, and the others go on."""
        try:
            look()
        except Exception as error:
            self.reasons.append(f"the check of {name} has failed")
            text = f"This could not be checked. {type(error).__name__}: {error}"
            self.add(name, "careful", text, "If the message does not say what to do, please report it.")

    def add(self, name: str, verdict: str, text: str, fix: str = "") -> None:
        from trl_kd.checks.finding import Finding

        self.findings.append(Finding(name, verdict, text, fix))

    def missing(self, name: str, what: str, error: Exception, where: str | None, fix: str) -> None:
        """What could not be looked at: a wrong path ends the run, a missing connection may be this machine's."""
        is_local = _is_local(where)
        told = str(error).strip().partition("\n")[0].rstrip() or type(error).__name__
        told = told if len(told) <= 300 else f"{told[:299]}…"
        if told.endswith(":"):  # a list follows, of what the library has tried
            told = "there is nothing that can be read."
        if is_local and not os.path.exists(where):
            told, fix = f"`{where}` is meant as a path, and there is nothing.", "Correct the path."
        elif not is_local:
            fix = "Check the name, and that this machine reaches the Hub."
        self.reasons.append(f"{what} could not be read")
        self.add(name, "stop" if is_local else "careful", f"{what} could not be read: {told}", fix)

    def read_configs(self) -> bool:
        """The models' configurations; whether all that are needed could be read."""
        from trl_kd.checks.architectures import config_of
        from trl_kd.trainer.setup import student_source

        args, kwargs = self.training_args, self.training_args.teacher_model_init_kwargs or {}
        wanted = {"student": (self.model_args.model_name_or_path, student_source(args))}
        for name in teacher_names(args)[:1]:
            wanted["teacher"] = (name, teacher_source(kwargs, args))
        for side, (name, source) in wanted.items():
            try:
                self.configs[side] = config_of(name, **source)
            except (ValueError, OSError) as error:
                fix = "Give the folder of a saved model, with its `config.json`."
                line = "memory" if not self.findings else "the teacher's memory"
                self.missing(line, f"The {side}'s configuration (`{name}`)", error, name, fix)
        return len(self.configs) == len(wanted)

    def plan(self) -> None:
        """Memory, from configurations alone."""
        from trl_kd.trainer.check import memory_of

        here, there = self.training_args.device.type, self.args.device_memory
        given = (self.method, self.script_args, self.training_args, self.model_args)
        if not self.read_configs():
            return
        try:
            planned = planned_run(*given, **self.configs, device_type=here if there is None else "cuda")
        except ValueError as error:
            self.add("memory", "stop", f"There is no plan: {error}", "The run would end here too: see the message.")
            return
        finding = memory_of(planned, there, self.training_args.device)
        self.findings.append(finding)
        if there is not None and not self.args.plan_only:
            finding = memory_of(planned_run(*given, **self.configs, device_type=here), None, self.training_args.device)
        if finding.verdict == "stop":
            self.reasons.append("they do not fit this machine")

    def read_rows(self) -> tuple[list[dict[str, Any]], Any, int | None]:
        """The first rows of the training data, their types, and how many rows there are, as far as that is known."""
        from trl_kd.scripts.arguments import select_split

        name, fix = self.script_args.dataset_name, "See that the file has one JSON object a line, and at least one."
        try:
            splits = _splits(self.script_args, self.dataset_args)
        except StopIteration:  # of an empty file
            self.add("data", "stop", "The dataset has no rows, so there is nothing to train on.", fix)
            return [], None, None
        except Exception as error:  # what a builder or a server raises is of any class
            self.missing("data", "The dataset", error, name, fix)
            return [], None, None
        if self.training_args.eval_strategy != "no" and self.dataset_args.test_split_size is None:
            self.has_split(splits, "evaluation data", "dataset_test_split", ", or set `--eval_strategy no`")
        if not self.has_split(splits, "data", "dataset_train_split"):
            return [], None, None
        stream = select_split(splits, self.script_args.dataset_train_split, "dataset_train_split")
        try:
            rows = list(islice(iter(stream), self.args.samples))
            if rows:
                return rows, stream.features, self.count_rows(stream)
            self.add("data", "stop", "The dataset has no rows, so there is nothing to train on.", fix)
        except Exception as error:
            self.missing("data", "The dataset", error, name, fix)
        return [], None, None

    def has_split(self, splits: Any, name: str, option: str, otherwise: str = "") -> bool:
        """Whether a split of the run is there; if it is not, the run would end."""
        from trl_kd.scripts.arguments import select_split

        try:
            select_split(splits, vars(self.script_args)[option], option)
        except ValueError as error:
            self.add(name, "stop", str(error), f"Set `--{option}` to one that is there{otherwise}.")
            return False
        return True

    def count_rows(self, stream: Any) -> int | None:
        """Rows of the training data, if the run goes by epochs and it costs no download."""
        if self.training_args.max_steps > 0 or self.dataset_args.datasets:
            return None
        splits = stream.info.splits or {}
        split = splits.get(self.script_args.dataset_train_split)
        if split is not None and split.num_examples:
            return split.num_examples
        if not os.path.exists(self.script_args.dataset_name):
            return None
        from trl_kd.scripts.arguments import load_splits

        return len(load_splits(self.script_args.dataset_name)[self.script_args.dataset_train_split])

    def look_at_text(self, rows: list[dict[str, Any]]) -> None:
        """Tokenizers, templates and rows."""
        from trl_kd.checks.text import text_findings

        path = self.model_args.model_name_or_path
        try:
            subject = self.subject(rows)
        except (ValueError, OSError) as error:
            fix = "Save the tokenizer in the model's folder: `tokenizer.save_pretrained(...)`."
            self.missing("tokenizers", f"The student's tokenizer (`{path}`)", error, path, fix)
            return
        if rows and subject is not None:
            # What could not be read is not "a teacher without a tokenizer"
            unread = ("vocabularies",) if any("The teacher's" in reason for reason in self.reasons) else ()
            self.findings += [finding for finding in text_findings(subject) if finding.name not in unread]

    def subject(self, rows: list[dict[str, Any]]) -> Any:
        """The run as the checks of text see it, from tokenizers and configurations."""
        from transformers import AutoTokenizer

        from trl_kd import _compat
        from trl_kd.checks.subject import Subject
        from trl_kd.generation import eos_token_ids
        from trl_kd.trainer.setup import own_tokenizer, student_source

        path, source = self.model_args.model_name_or_path, student_source(self.training_args)
        tokenizer = own_tokenizer(None, path, copy.copy(self.training_args), source)
        if (student := self.configs.get("student")) is None:
            return None
        theirs: dict[str, Any] = dict.fromkeys(("teacher_tokenizer", "teacher_rows", "teacher_eos_token_ids"))
        names = teacher_names(self.training_args)
        if names and (config := self.configs.get("teacher")) is not None:
            own = teacher_source(self.training_args.teacher_model_init_kwargs or {}, self.training_args)
            theirs |= {
                "teacher_rows": config.get_text_config().vocab_size,
                "teacher_context": _compat.context_length(config),
            }
            try:
                other = AutoTokenizer.from_pretrained(names[0], **own)
                theirs |= {
                    "teacher_tokenizer": other,
                    "teacher_eos_token_ids": eos_token_ids(names[0], other, **own),
                }
            except (ValueError, OSError) as error:
                if not os.path.isdir(names[0]):  # a folder without a tokenizer is a teacher without one
                    self.missing("tokenizers", f"The teacher's tokenizer (`{names[0]}`)", error, names[0], "")
        return Subject(
            method=self.method,
            args=self.training_args,
            tokenizer=tokenizer,
            student_rows=student.get_text_config().vocab_size,
            eos_token_ids=eos_token_ids(path, tokenizer, **source),
            rows=rows,
            student_context=_compat.context_length(student),
            **theirs,
        )

    def look_at_models(self, rows: list[dict[str, Any]], features: Any, num_rows: int | None) -> None:
        """Likelihoods, rollouts and time, with the trainer that the command would build."""
        from datasets import Dataset

        import trl_kd
        from trl_kd.scripts.training import METHODS, build_trainer, load_datasets
        from trl_kd.trainer.check import live_findings, steps_of
        from trl_kd.trainer.probes import sample_rows, untouched

        trainer_class = getattr(trl_kd, METHODS[self.method][1])
        with TemporaryDirectory() as folder:
            try:
                own = _without_traces(self.training_args, folder)
                if own.teacher_cache is None:
                    dataset = Dataset.from_list(rows, features=features)
                else:  # it belongs to the rows of the whole dataset
                    dataset, num_rows = load_datasets(self.script_args, own, self.dataset_args)[0], None
                trainer = build_trainer(trainer_class, own, self.model_args, dataset)
            except Exception as error:  # whatever it is, the run would end there
                fix = "The command of the run would end here too: do what the message says."
                self.add("start", "stop", f"The trainer cannot be made. {type(error).__name__}: {error}", fix)
                return
            if num_rows is not None:
                num_rows = round(num_rows * len(trainer.train_dataset) / len(rows))
            prepared = sample_rows(trainer.train_dataset, self.args.samples)
            known = num_rows is not None or own.teacher_cache is not None or own.max_steps > 0
            with untouched(trainer):
                self.findings += live_findings(
                    trainer, prepared, num_steps=steps_of(trainer, num_rows) if known else None
                )


_NOT_LOADED = "The models were not loaded, because {}; so likelihoods, rollouts and time were not looked at."
_AGAIN = "Check again when that is mended, or on the machine of the run."


def _is_local(name: str | None) -> bool:
    """Whether a name is meant as a path on this machine."""
    from trl_kd.scripts.arguments import BUILDERS

    return name is not None and (
        os.path.exists(name) or name.startswith((".", "/", "~")) or name.endswith(tuple(BUILDERS))
    )


def _splits(script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig") -> Any:
    """The dataset as streams, so that the first rows cost nothing but themselves."""
    from trl import get_dataset

    from trl_kd.scripts.arguments import load_splits

    if not dataset_args.datasets:
        return load_splits(script_args.dataset_name, config=script_args.dataset_config, streaming=True)
    mixture = copy.copy(dataset_args)
    mixture.streaming, mixture.test_split_size = True, None  # a stream cannot be split
    return get_dataset(mixture)


def _without_traces(training_args: "KDConfig", folder: str) -> "KDConfig":
    """The configuration without anything that a trainer would leave behind when it is made."""
    own = copy.copy(training_args)
    own.output_dir, own.push_to_hub, own.report_to, own.disable_tqdm = folder, False, [], True
    own.eval_strategy, own.load_best_model_at_end, own.eval_teacher_cache = "no", False, None
    return own
