"""`trainer.check()`: what it finds, and that nothing of it stays."""

import copy
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, TrainerCallback

from tests.tiny import make_tokenizer
from tests.trainer.dual import OTHER_TEXT, dual_pair
from tests.trainer.dual import make_trainer as make_dual
from tests.trainer.runs import config, logged, pair, same, state_of, tiny_dataset
from tests.trainer.sparse import sparse_config, sparse_pair, sparse_rows
from trl_kd import AMMConfig, AMMTrainer, SparseTDTrainer
from trl_kd.checks.live import Written, rollout_finding
from trl_kd.checks.memory import PlannedRun
from trl_kd.data import KDCollator, prepare_dataset
from trl_kd.generation import rollout_seed
from trl_kd.teachers import LocalTeacher
from trl_kd.teachers.cache_writer import CacheSettings, write_cache
from trl_kd.trainer.check import memory_of, planned_run_of, raw_row, steps_of, subject_of
from trl_kd.trainer.probes import sample_rows, untouched


STEPS = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lmbda": 0.5}


def amm(tokenizer, folder, **overrides):
    args = config(folder, **(STEPS | {"train_sampling_strategy": "random", "learning_rate": 1e-3} | overrides))
    return AMMTrainer(*pair(tokenizer), args, tiny_dataset(), processing_class=tokenizer)


def dskd_same(tokenizer, folder, **overrides):
    return make_dual(dual_pair(tokenizer), (tokenizer, tokenizer), folder, **(STEPS | overrides))


def dskd_dual(tokenizer, folder, **overrides):
    other = make_tokenizer(OTHER_TEXT, vocab_size=330)
    return make_dual(dual_pair(tokenizer, other), (tokenizer, other), folder, **(STEPS | overrides))


def sparse(tokenizer, folder, **overrides):
    args = sparse_config(folder, **(STEPS | overrides))
    options = {"lm_dataset": tiny_dataset(6)} if args.preset == "paper" else {}
    return SparseTDTrainer(*sparse_pair(), args, sparse_rows(), processing_class=tokenizer, **options)


RUNS = {
    "amm": (amm, {}),
    "amm_critic_before": (amm, {"critic": "value_head"}),
    "amm_critic_after": (amm, {"critic": "value_head", "critic_order": "after"}),
    "amm_full": (amm, {"critic": "value_head", "on_policy_gradient": "full", "later_baseline": "value"}),
    "amm_checkpointing": (amm, {"gradient_checkpointing": True}),
    "dskd": (dskd_same, {"projector_pretraining_steps": 2}),
    "dskd_across": (dskd_dual, {"projector_pretraining_steps": 2, "alignment": "eta"}),
    "dskd_cma": (dskd_dual, {"alignment": "cma", "preset": "v1"}),
    "sparse_td": (sparse, {}),
    "sparse_td_target": (sparse, {"preset": "paper", "target_ema": 0.5}),
}


def run_of(trainer):
    """Losses, and all that a run leaves."""
    trainer.train()
    return logged(trainer, "loss"), state_of(trainer)


def equal(left, right):
    return left[0] == right[0] and all(same(a, b) for a, b in zip(left[1], right[1], strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_check_before_a_run_changes_no_bit_of_it(name, tokenizer, tmp_path):
    make, overrides = RUNS[name]
    plain = run_of(make(tokenizer, tmp_path / "plain", **overrides))
    trainer = make(tokenizer, tmp_path / "checked", **overrides)
    found = {finding.name for finding in trainer.check(samples=6, rollouts=4, quiet=True)}
    assert {"memory", "likelihood", "rollouts", "time"} <= found
    assert equal(run_of(trainer), plain)


class Looking(TrainerCallback):
    """Checks in the middle of a run."""

    trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.trainer.check(samples=4, rollouts=2, quiet=True)


@pytest.mark.parametrize("name", ["amm_critic_after", "amm_full", "dskd", "sparse_td_target"])
def test_check_between_two_steps_changes_no_bit_of_the_run(name, tokenizer, tmp_path):
    make, overrides = RUNS[name]
    plain = run_of(make(tokenizer, tmp_path / "plain", **overrides))
    trainer = make(tokenizer, tmp_path / "checked", **overrides)
    looking = Looking()
    looking.trainer = trainer
    trainer.add_callback(looking)
    assert equal(run_of(trainer), plain)


def everything(trainer):
    """Bits of all that a check may touch."""
    tensors = [*trainer.model.state_dict().values(), *trainer.auxiliary.modules.state_dict().values()]
    tensors += list(trainer.teacher.model.state_dict().values())
    modes = [module.training for module in [*trainer.model.modules(), *trainer.teacher.model.modules()]]
    random_states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    attributes = {name: id(value) for name, value in vars(trainer).items()}
    auxiliary = {name: id(value) for name, value in vars(trainer.auxiliary).items()}
    return copy.deepcopy((tensors, modes, random_states, attributes, auxiliary, trainer.state.global_step))


def test_untouched_sets_back_all_that_is_changed_inside(tokenizer, tmp_path):
    trainer = amm(tokenizer, tmp_path, critic="value_head", critic_order="after")
    trainer._sums["train"].add("kd/marked", 3.0)
    before = everything(trainer)
    with untouched(trainer):
        random.random(), np.random.rand(), torch.rand(1)
        trainer.model.train()
        trainer.model.gradient_checkpointing_enable()
        trainer.auxiliary.start(5)
        for parameter in [*trainer.model.parameters(), *trainer.auxiliary.modules.parameters()]:
            parameter.grad = torch.ones_like(parameter)
        trainer.auxiliary.critic_optimizer.step()
        trainer._sums["train"].add("kd/marked", 5.0)
        trainer._seen, trainer.added = [1], 2
        assert not same(dict(enumerate(everything(trainer)[0])), dict(enumerate(before[0])))
    after = everything(trainer)
    assert same(dict(enumerate(after[0])), dict(enumerate(before[0])))
    assert after[1:] == before[1:]
    assert trainer._sums["train"].pop() == {"kd/marked": 3.0}
    assert not trainer.model.is_gradient_checkpointing
    assert trainer.auxiliary.optimizer is None and trainer.auxiliary.critic_optimizer is None
    parameters = [*trainer.model.parameters(), *trainer.auxiliary.modules.parameters()]
    assert all(parameter.grad is None for parameter in parameters)


def test_untouched_gives_gradients_and_optimizers_back(tokenizer, tmp_path):
    """Between two steps of a run that accumulates by hand."""
    trainer = amm(tokenizer, tmp_path, critic="value_head")
    trainer.train()
    gradient = torch.ones_like(next(trainer.model.parameters()))
    next(trainer.model.parameters()).grad = gradient
    optimizer, moments = trainer.auxiliary.critic_optimizer, copy.deepcopy(state_of(trainer)[2])
    with untouched(trainer):
        assert next(trainer.model.parameters()).grad is None
        for parameter in trainer.auxiliary.modules.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert not same(state_of(trainer)[2], moments)
    assert next(trainer.model.parameters()).grad is gradient
    assert trainer.auxiliary.critic_optimizer is optimizer
    assert same(state_of(trainer)[2], moments)


def by_name(findings):
    return {finding.name: finding for finding in findings}


@pytest.mark.parametrize("name", RUNS)
def test_check_puts_a_step_on_the_clock(name, tokenizer, tmp_path):
    make, overrides = RUNS[name]
    found = by_name(make(tokenizer, tmp_path, **overrides).check(samples=6, rollouts=4, quiet=True))
    assert found["time"].verdict == "fine", found["time"].text
    values = found["time"].values
    assert values["steps"] == 3 and values["seconds"] == pytest.approx(3 * values["seconds_per_step"])
    assert set(values["parts"]) == {"rollouts", "forward and backward"}
    assert values["micro_batches_measured"] == values["micro_batches"] == 2
    assert found["likelihood"].values["unit"] == ("byte" if "across" in name or "cma" in name else "token")


# What it finds


def plain_nll(model, rows):
    """Nats of each row's labels, by the model's own logits, one row at a time."""
    found = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        log_probs = logits.log_softmax(-1)
        places = [i for i, label in enumerate(row["labels"]) if i and label != -100]
        found.append((sum(-log_probs[i - 1, row["labels"][i]].item() for i in places), len(places)))
    return found


def rate(pairs):
    return sum(nats for nats, _ in pairs) / sum(units for _, units in pairs)


@pytest.mark.parametrize("overrides", [{}, {"packing": True, "lmbda": 0.0, "max_length": 40}])
def test_check_likelihoods_are_those_of_the_models_own_logits(overrides, tokenizer, tmp_path):
    trainer = amm(tokenizer, tmp_path, **overrides)
    findings = by_name(trainer.check(samples=16, quiet=True))
    assert ("packed rows" in findings) == bool(overrides)
    found = findings["likelihood"]
    rows = amm(tokenizer, tmp_path).train_dataset
    for which, model in (("student", trainer.model), ("teacher", trainer.teacher.model)):
        assert found.values[f"{which}_nats"] == pytest.approx(rate(plain_nll(model, rows)), rel=1e-5)
    assert found.values["rows"] == 16
    gaps = [
        a[0] / a[1] - b[0] / b[1]
        for a, b in zip(*(plain_nll(m, rows) for m in (trainer.model, trainer.teacher.model)), strict=True)
    ]
    assert found.values["gap"] == pytest.approx(sum(gaps) / 16, rel=0.2)  # rows are of nearly one length


def test_check_across_vocabularies_counts_bytes_of_each_side(tokenizer, tmp_path):
    trainer = dskd_dual(tokenizer, tmp_path, alignment="eta")
    found = by_name(trainer.check(samples=16, quiet=True))["likelihood"]
    rows = trainer.train_dataset
    num_bytes = sum(len(row["completion"].encode()) for row in rows)
    teachers = [{name: row[f"teacher_{name}"] for name in ("input_ids", "labels")} for row in rows]
    for which, model, own in (("student", trainer.model, rows), ("teacher", trainer.teacher.model, teachers)):
        nats = sum(nats for nats, _ in plain_nll(model, own))
        assert found.values[f"{which}_nats"] == pytest.approx(nats / num_bytes, rel=1e-5)
    assert "nats per byte" in found.text


def test_check_of_a_cache_compares_the_tokens_that_it_knows(tokenizer, tmp_path):
    student, teacher = sparse_pair()
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    rows, ends = sparse_rows(), [tokenizer.eos_token_id]
    prepared = prepare_dataset(rows, tokenizer, max_length=12, eos_token_ids=ends)
    settings = CacheSettings(bits=32, batch_size=4)
    cache = str(tmp_path / "cache")
    write_cache(prepared, LocalTeacher(str(tmp_path / "teacher")), tokenizer, cache, ends, settings)
    args = sparse_config(tmp_path / "out", teacher_cache=cache, action_top_p=0.5)
    trainer = SparseTDTrainer(student, None, args, rows, processing_class=tokenizer)
    findings = by_name(trainer.check(samples=16, quiet=True))
    found = findings["likelihood"].values
    known = {"student": [0.0, 0], "teacher": [0.0, 0]}
    for row in trainer.train_dataset:
        with torch.no_grad():
            log_probs = {
                name: model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
                for name, model in (("student", student), ("teacher", teacher))
            }
        for i in range(1, len(row["labels"])):
            if row["labels"][i] == -100:
                continue
            theirs = log_probs["teacher"][i - 1]
            order = theirs.argsort(descending=True).tolist()
            mass_before = theirs.exp()[order[: order.index(row["labels"][i])]].sum()
            if mass_before < 0.5:  # in the smallest set of that mass
                for name, sums in known.items():
                    sums[0] -= log_probs[name][i - 1, row["labels"][i]].item()
                    sums[1] += 1
    total = sum(label != -100 for row in trainer.train_dataset for label in row["labels"][1:])
    assert 0 < known["student"][1] < total
    assert found["known_share"] == pytest.approx(known["student"][1] / total)
    for name, (nats, count) in known.items():
        assert found[f"{name}_nats"] == pytest.approx(nats / count, rel=1e-3)
    assert "of tokens that the cache knows" in findings["likelihood"].text
    assert findings["time"].verdict == "fine" and findings["rollouts"].text == "Nobody writes completions in this run."


def test_check_of_several_teachers_judges_each_on_its_rows(tokenizer, tmp_path):
    student, worse = pair(tokenizer)
    better = copy.deepcopy(student)
    with torch.no_grad():
        better.get_output_embeddings().weight.mul_(0.5)
    rows = tiny_dataset().add_column("who", [0, 1] * 8)
    args = config(tmp_path, teacher_column="who", lmbda=0.0)
    trainer = AMMTrainer(student, [worse, better], args, rows, processing_class=tokenizer)
    found = [f for f in trainer.check(samples=16, quiet=True) if f.name.startswith("likelihood")]
    # Better, though no better than a guess
    assert [finding.verdict for finding in found] == ["stop", "careful"]
    assert "The teacher is better, but a guess among" in found[1].text
    for number, (finding, model) in enumerate(zip(found, (worse, better), strict=True)):
        own = [trainer.train_dataset[i] for i in range(number, 16, 2)]
        assert finding.values["rows"] == 8
        assert finding.values["teacher_nats"] == pytest.approx(rate(plain_nll(model, own)), rel=1e-5)
        assert finding.values["student_nats"] == pytest.approx(rate(plain_nll(student, own)), rel=1e-5)


def test_check_prompts_alone_are_judged_on_what_the_teacher_writes(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    rows = tiny_dataset().remove_columns("completion")
    trainer = AMMTrainer(student, teacher, config(tmp_path, lmbda=1.0), rows, processing_class=tokenizer)
    finding = by_name(trainer.check(samples=8, quiet=True))["likelihood"]
    # It knows its own words better than anybody
    assert finding.values["teacher_nats"] < finding.values["student_nats"]
    assert finding.values["rows"] == 8 and "The teacher wrote them itself" in finding.text


def test_check_same_base_as_teacher_has_nothing_to_teach(tokenizer, tmp_path):
    from peft import LoraConfig

    student = pair(tokenizer)[0]
    args = config(tmp_path, teacher_adapter="base", lmbda=0.5)
    peft_config = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = AMMTrainer(student, None, args, tiny_dataset(), processing_class=tokenizer, peft_config=peft_config)
    found = by_name(trainer.check(samples=8, rollouts=4, quiet=True))
    assert found["likelihood"].verdict == "careful" and "they are one model" in found["likelihood"].text
    assert found["rollouts"].values["student"] == found["rollouts"].values["teacher"]  # the same seed
    assert found["time"].verdict == "fine"


def test_check_trains_no_projector_for_a_probe(tokenizer, tmp_path, monkeypatch):
    trainer = dskd_same(tokenizer, tmp_path, projector_pretraining_steps=2)
    monkeypatch.setattr("trl_kd.trainer.dskd_trainer.pretrain_projector", lambda *args: 1 / 0)
    trainer.check(samples=4, rollouts=2, quiet=True)
    with pytest.raises(ZeroDivisionError):  # the run still does
        trainer.train()


def test_check_scales_a_part_of_a_step_to_the_whole(tokenizer, tmp_path, monkeypatch):
    """Two of eight micro-batches, of 6 and 0.75 seconds each."""

    def seconds(trainer, batches):
        return {"rollouts": 6.0 * len(batches), "rest": 0.75 * len(batches)}

    monkeypatch.setattr("trl_kd.trainer.probes._step_seconds", seconds)
    trainer = amm(tokenizer, tmp_path, gradient_accumulation_steps=8)
    finding = by_name(trainer.check(samples=4, rollouts=2, quiet=True))["time"]
    assert finding.values["micro_batches_measured"] == 2 and finding.values["micro_batches"] == 8
    assert finding.values["parts"] == {"rollouts": 48.0, "rest": 6.0}
    assert finding.values["seconds"] == 3 * 54.0


@pytest.mark.parametrize("make", [amm, dskd_dual])
def test_check_rollouts_are_those_of_the_runs_own_sampling(make, tokenizer, tmp_path, monkeypatch):
    seen = {}

    def look(student, teacher, **kwargs):
        seen.update(student=student, teacher=teacher)
        return rollout_finding(student, teacher, **kwargs)

    monkeypatch.setattr("trl_kd.trainer.check.rollout_finding", look)
    trainer = make(tokenizer, tmp_path, repetition_penalty=1.3)
    found = by_name(trainer.check(samples=16, rollouts=4, quiet=True))["rollouts"]
    ends = {"student": trainer.eos_token_ids, "teacher": trainer.eos_token_ids}
    if make is dskd_dual:
        ends["teacher"] = [trainer.teacher_processing_class.eos_token_id]
    rows = [trainer.train_dataset[i] for i in range(4)]
    for who, writer in (("student", trainer.write_with_student), ("teacher", trainer.write_with_teacher)):
        prompts = [trainer.row_format.prompt(row, who) for row in rows]
        written = Written(writer(prompts, rollout_seed(trainer.args.seed, -3, 0)), ends[who])
        assert seen[who] == written and found.values[who] == written.values()
    first = seen["student"].completions[0]
    assert found.sample and found.sample == tokenizer.decode(first, skip_special_tokens=True)


def test_check_prints_its_table_unless_it_is_quiet(tokenizer, tmp_path, capsys):
    trainer = amm(tokenizer, tmp_path)
    capsys.readouterr()
    findings = trainer.check(samples=4, rollouts=2, quiet=True)
    assert capsys.readouterr().out == ""
    assert [finding.name for finding in trainer.check(samples=4, rollouts=2)] == [f.name for f in findings]
    out = capsys.readouterr().out
    assert out.startswith("AMMTrainer on cpu") and "likelihood" in out


def test_check_what_would_end_the_run_is_a_finding(tokenizer, tmp_path, monkeypatch):
    trainer = amm(tokenizer, tmp_path, lmbda=0.0)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(float("nan"))
    found = by_name(trainer.check(samples=4, rollouts=2, quiet=True))
    assert found["time"].verdict == "stop" and "The student's hidden states are not finite" in found["time"].text
    assert found["likelihood"].verdict == "stop" and "The student's likelihoods are" in found["likelihood"].text

    def no_room(*args):
        raise torch.OutOfMemoryError("8 GiB more")

    monkeypatch.setattr("trl_kd.trainer.check.likelihoods", no_room)
    found = by_name(trainer.check(samples=4, rollouts=2, quiet=True))
    assert found["likelihood"].verdict == "stop" and "8 GiB more" in found["likelihood"].text
    assert "`per_device_train_batch_size`" in found["likelihood"].fix


def test_check_of_a_sharded_run_says_what_it_leaves_out(tokenizer, tmp_path):
    trainer = amm(tokenizer, tmp_path)
    trainer.is_fsdp_enabled = True
    found = by_name(trainer.check(samples=4, quiet=True))
    assert found["models"].verdict == "careful" and "on one process" in found["models"].fix
    assert "time" not in found and "memory" in found


# The trainer's parts


def test_planned_run_of_a_trainer_has_its_models_and_rows(tokenizer, tmp_path):
    from peft import LoraConfig

    student, teacher = pair(tokenizer)
    args = config(tmp_path, lmbda=0.5, off_policy_source="teacher")
    peft_config = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = AMMTrainer(
        student, teacher.bfloat16(), args, tiny_dataset(), processing_class=tokenizer, peft_config=peft_config
    )
    run = planned_run_of(trainer, [trainer.train_dataset[0]])
    assert (run.method, run.args, run.device_type) == ("amm", trainer.args, "cpu")
    assert (run.student.hidden_size, run.teacher.hidden_size) == (32, 48)
    assert (run.student_dtype, run.teacher_dtype) == (torch.float32, torch.bfloat16)
    assert run.peft_config.r == 3 and run.teacher_writes
    rows = list(trainer.train_dataset)
    assert run.longest == max(len(row["input_ids"]) for row in rows) > len(rows[0]["input_ids"])
    assert run.longest_prompt == max(row["prompt_length"] for row in rows)
    alone = AMMTrainer(student, teacher, config(tmp_path, lmbda=0.0), tiny_dataset(), processing_class=tokenizer)
    run = planned_run_of(alone, [alone.train_dataset[0]])
    assert run.peft_config is None and not run.teacher_writes


def test_check_plans_for_the_card_or_the_device(tokenizer, tmp_path, monkeypatch):
    trainer = amm(tokenizer, tmp_path)
    found = by_name(trainer.check(samples=4, rollouts=2, quiet=True, device_memory_gb=3.0))["memory"]
    assert found.values["budget"] == 3 * 2**30 and "a card of 3 GB" in found.text
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**9))
    taken = sum(p.nbytes for model in (trainer.model, trainer.teacher.model) for p in model.parameters())
    found = by_name(trainer.check(samples=4, rollouts=2, quiet=True))["memory"]
    assert found.values["budget"] == 10**9 + taken and "the CPU" in found.text
    monkeypatch.setattr("trl_kd.trainer.check.device_memory", lambda: None)
    found = memory_of(planned_run_of(trainer, []), None, torch.device("cuda"))
    assert found.verdict == "careful" and "`device_memory`" in found.fix
    trainer.args.max_length = None
    run = replace(planned_run_of(trainer, []), longest=None)
    assert "There is no plan" in memory_of(run, 3.0, torch.device("cuda")).text


def test_subject_of_a_trainer_has_raw_rows_and_the_batch_of_its_collator(tokenizer, tmp_path):
    trainer = amm(tokenizer, tmp_path)
    rows = [trainer.train_dataset[i] for i in (0, 1)]
    subject = subject_of(trainer, rows)
    raw = tiny_dataset()
    assert sorted(row["prompt"] for row in subject.rows) == sorted(raw[i]["prompt"] for i in (0, 1))
    assert all(set(row) == {"prompt", "completion"} for row in subject.rows)
    assert subject.batch["labels"].shape[0] == 2
    assert (subject.student_rows, subject.teacher_rows) == (384, 384) and subject.teacher_context == 512
    assert subject.eos_token_ids == [tokenizer.eos_token_id]
    across = dskd_dual(tokenizer, tmp_path, alignment="eta")
    subject = subject_of(across, [across.train_dataset[0]])
    assert set(subject.rows[0]) == {"prompt", "completion"}
    assert subject.teacher_tokenizer is across.teacher_processing_class
    assert subject.teacher_rows == across.teacher.model.config.vocab_size


def test_raw_row_of_token_ids_keeps_them():
    row = {"input_ids": [1, 2], "labels": [1, 2], "prompt_length": 0}
    assert raw_row(row) == row
    assert raw_row(row | {"story": "a"}, "story") == {"story": "a"}
    packed = {"input_ids": [1, 2], "labels": [1, 2], "seq_lengths": [2]}
    assert raw_row(packed) == packed


def test_check_steps_are_those_of_the_trainer(tokenizer, tmp_path):
    overrides = {"max_steps": -1, "num_train_epochs": 1.5, "gradient_accumulation_steps": 3, "lmbda": 0.0}
    trainer = amm(tokenizer, tmp_path, **overrides)
    steps = steps_of(trainer)
    trainer.train()
    assert steps == trainer.state.max_steps == 5  # 8 batches of 2, 3 steps an epoch


def test_sample_rows_are_from_all_over_a_dataset():
    dataset = tiny_dataset(16)
    assert sample_rows(dataset, 4) == [dataset[i] for i in (0, 4, 8, 12)]
    assert sample_rows(dataset, 99) == list(dataset)
    assert sample_rows(dataset.to_iterable_dataset(), 3) == [dataset[i] for i in range(3)]


def test_check_finds_a_collator_that_masks_every_end(tokenizer, tmp_path):
    """The pad token is the EOS, and padding is told apart by its id."""
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.eos_token

    def collate(rows):
        batch = KDCollator(own.pad_token_id)(rows)
        return batch | {"labels": batch["labels"].masked_fill(batch["input_ids"] == own.pad_token_id, -100)}

    args = config(tmp_path, lmbda=0.0)
    trainer = AMMTrainer(*pair(own), args, tiny_dataset(), processing_class=own, data_collator=collate)
    finding = by_name(trainer.check(samples=8, quiet=True))["end of a completion"]
    assert finding.verdict == "stop" and "the collator masks it in `labels`" in finding.text
    assert "Leave out `data_collator`" in finding.fix


def test_quantised_student_without_an_adapter_stops(tmp_path):
    args = AMMConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    tiny = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    run = PlannedRun("amm", args, tiny, tiny, torch.bfloat16, student_bits=4, device_type="cpu")
    finding = memory_of(run, 8.0, torch.device("cpu"))
    assert finding.verdict == "stop" and "--use_peft true" in finding.fix
    endless = AMMConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_length=None)
    run = PlannedRun("amm", endless, tiny, tiny, torch.float32)
    assert memory_of(run, 8.0, torch.device("cpu")).verdict == "careful"


def test_base_of_the_student_writes_where_there_are_prompts_alone(tokenizer, tmp_path):
    student, _ = pair(tokenizer)
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in tiny_dataset()])
    args = config(tmp_path, teacher_adapter="base")
    lora = LoraConfig(r=2, target_modules="all-linear")
    trainer = AMMTrainer(student, None, args, prompts, processing_class=tokenizer, peft_config=lora)
    found = {finding.name: finding for finding in trainer.check(quiet=True)}
    assert "not one teacher to write" not in found["likelihood"].text
