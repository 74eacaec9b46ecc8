"""Two processes give what one gives, stay equal to each other, and resume to the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.worker import NUMBERS
from tests.trainer.runs import ProjectingTrainer, config, logged, pair, tiny_dataset


ROOT = Path(__file__).parents[2]


def launch(scenario, folder):
    """Run the scenario on two ranks; their reports."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", "tests.distributed.worker", scenario, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((Path(folder) / f"{scenario}-{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_have_the_gradient_norm_of_one(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    args = config(tmp_path / "one", temperature=0.0, learning_rate=1e-3)
    one = ProjectingTrainer(student, teacher, args, tiny_dataset(), processing_class=tokenizer)
    one.train()
    ranks = [reports[0] for reports in launch("norm", tmp_path)]
    for name in NUMBERS:
        assert len(logged(one, name)) == 2
        assert ranks[0][name] == pytest.approx(logged(one, name), rel=1e-5), name
    assert [report["rollouts"] for report in ranks] == [1, 1]


def test_two_ranks_stay_equal_and_resume_to_the_same_bits(tmp_path):
    first, second = launch("resume", tmp_path)
    # Full, LoRA, and full again after a kill in the middle of a save
    for whole, resumed in (first[0:2], first[2:4], (first[0], first[4])):
        for name in ("loss", "grad_norm", "kd/aux_grad_norm"):
            assert len(set(whole[name])) == 6
            assert resumed[name][-3:] == whole[name][-3:], name
        assert resumed["weights"] == whole["weights"]
    assert [report["weights"] for report in first] == [report["weights"] for report in second]
