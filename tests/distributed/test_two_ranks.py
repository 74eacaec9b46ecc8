"""Two processes give what one gives, stay equal to each other, and resume to the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.worker import (
    CRITIC_NUMBERS,
    DUAL_NUMBERS,
    DUAL_RUNS,
    GAMES,
    NUMBERS,
    SPARSE_NUMBERS,
    SPARSE_RUNS,
    TEACHER_NUMBERS,
    TEACHERS,
    VLLM_RUNS,
    run_dual,
    run_sparse,
    run_teachers,
)
from tests.trainer.runs import ProjectingTrainer, config, logged, pair, tiny_dataset
from trl_kd import AMMTrainer


ROOT = Path(__file__).parents[2]


def launch(scenario, folder):
    """Run the scenario on two ranks; their reports."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", "tests.distributed.worker", scenario, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((Path(folder) / f"{scenario}-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def norms(tmp_path_factory):
    return launch("norm", tmp_path_factory.mktemp("norm"))


def test_two_ranks_have_the_gradient_norm_of_one(tokenizer, tmp_path, norms):
    student, teacher = pair(tokenizer)
    args = config(tmp_path / "one", temperature=0.0, learning_rate=1e-3)
    one = ProjectingTrainer(student, teacher, args, tiny_dataset(), processing_class=tokenizer)
    one.train()
    ranks = [reports[0] for reports in norms]
    for name in NUMBERS:
        assert len(logged(one, name)) == 2
        assert ranks[0][name] == pytest.approx(logged(one, name), rel=1e-5), name
    assert [report["rollouts"] for report in ranks] == [1, 1]


@pytest.mark.parametrize("index", range(len(GAMES)))
def test_two_ranks_with_critics_have_the_gradient_norm_of_one(tokenizer, tmp_path, norms, index):
    student, teacher = pair(tokenizer)
    whole = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    args = config(tmp_path, temperature=0.0, learning_rate=1e-4, **(GAMES[index] | whole))
    one = AMMTrainer(student, teacher, args, tiny_dataset(), processing_class=tokenizer)
    one.train()
    ranks = [reports[1 + index] for reports in norms]
    for name in CRITIC_NUMBERS:
        expected = logged(one, name)
        # The loss holds advantages times log-likelihoods of size 10, which nearly cancel
        rounding = 3e-5 if name == "loss" else 1e-7
        assert len(expected) == 2 and ranks[0][name] == pytest.approx(expected, rel=1e-5, abs=rounding), name
    assert ranks[0]["weights"] == ranks[1]["weights"]


def test_two_ranks_in_two_spaces_have_the_gradient_norm_of_one(tmp_path):
    first, second = launch("dual", tmp_path)
    for options, report, other in zip(DUAL_RUNS, first, second, strict=True):
        whole = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
        one = run_dual(tmp_path / "one", **(options | whole))
        for name in DUAL_NUMBERS:
            # Rounding is another, and grows from step to step
            assert len(one[name]) >= 3 and report[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7), name
        assert any(0 < share < 1 for share in one["kd/off_policy/gate"])
        assert report["weights"] == other["weights"]


def test_two_ranks_on_sets_have_the_gradient_norm_of_one(tmp_path):
    first, second = launch("sparse", tmp_path)
    for options, report, other in zip(SPARSE_RUNS, first, second, strict=True):
        whole = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
        one = run_sparse(tmp_path / "one", **(options | whole))
        known = [name for name in SPARSE_NUMBERS if one[name]]
        assert len(known) >= 12 and "kd/off_policy/second_nll" in known
        for name in known:
            # Rounding is another, and grows from step to step
            assert len(one[name]) == 3 and report[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
        assert report["weights"] == other["weights"]


def test_two_ranks_with_other_teachers_have_the_gradient_norm_of_one(tmp_path):
    first, second = launch("teachers", tmp_path)
    for source, report, other in zip(TEACHERS, first, second, strict=True):
        one = run_teachers(tmp_path / "one", source, per_device_train_batch_size=4)
        for name in TEACHER_NUMBERS:
            # Rounding is another, and grows from step to step
            assert len(one[name]) == 3 and report[name] == pytest.approx(one[name], rel=1e-4), (source, name)
        assert report["weights"] == other["weights"]


def test_two_ranks_stay_equal_and_resume_to_the_same_bits(tmp_path):
    first, second = launch("resume", tmp_path)
    # Full, LoRA, and full again after a kill in the middle of a save
    for whole, resumed in (first[0:2], first[2:4], (first[0], first[4])):
        for name in ("loss", "grad_norm", "kd/aux_grad_norm"):
            assert len(set(whole[name])) == 6
            assert resumed[name][-3:] == whole[name][-3:], name
        assert resumed["weights"] == whole["weights"]
    whole, resumed = first[5:]  # with critics and a baseline of returns
    for name in CRITIC_NUMBERS:
        assert len(set(whole[name])) == 6 and resumed[name][-3:] == whole[name][-3:], name
    assert resumed["weights"] == whole["weights"]
    assert [report["weights"] for report in first] == [report["weights"] for report in second]


@pytest.fixture(scope="module")
def vllm_ranks(tmp_path_factory):
    """What each of two ranks reports, by run."""
    return [dict(zip(VLLM_RUNS, reports, strict=True)) for reports in launch("vllm", tmp_path_factory.mktemp("vllm"))]


def test_two_ranks_write_by_vllm_what_they_write_by_generate(vllm_ranks):
    first, second = vllm_ranks
    for mode, lmbda, temperature in VLLM_RUNS:
        run = (mode, lmbda, temperature)
        if mode == "generate" or temperature > 0:
            continue
        for rank in (first, second):
            for name in NUMBERS:
                assert rank[run][name] == pytest.approx(rank["generate", lmbda, 0.0][name], rel=1e-5), (run, name)
        # One call of each rank per step, for three rows of four, or for two that are all on one rank
        asked = list(zip(first[run]["asked"], second[run]["asked"], strict=True))
        assert len(asked) == 2 and {sum(pair) for pair in asked} == {4 * lmbda}
        assert any(0 in pair for pair in asked) == (lmbda == 0.5)


def test_two_ranks_of_one_vllm_draw_the_same_and_of_two_not(vllm_ranks):
    first, second = vllm_ranks
    together, alone = ("tensor parallel", 0.75, 1.0), ("colocate", 0.75, 1.0)
    assert len(first[together]["written"]) == 8 and first[together]["written"] == second[together]["written"]
    assert [len(rank[alone]["written"]) for rank in vllm_ranks] == [4, 4]
    assert len({seed for rank in vllm_ranks for seed in rank[alone]["seeds"]}) == 4  # two steps each
