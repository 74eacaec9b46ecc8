"""A run that pushes over HTTP, goes on elsewhere from what it pushed, and is used by plain transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.stand_in import Hub, running_hub
from tests.hub.worker import CUT, FULL, LORA, STEPS, STUDENT, TEACHER


ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


def environment(hub: Hub, folder: Path, machine: str) -> dict[str, str]:
    """That of a process which knows this Hub alone, and has downloaded nothing yet."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_")) and not name.lower().endswith("_proxy")
    }
    return kept | {
        **{"HF_ENDPOINT": hub.address, "HF_TOKEN": hub.token, "HF_HOME": str(folder / machine)},
        # The stand-in keeps large files as LFS did, and counts nobody
        **{"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    }


def start(hub: Hub, folder: Path, machine: str, *command: str) -> dict:
    """What a process found, which started on a machine of its own."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(hub, folder, machine),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{machine}.json").read_text())


def files_at_root(hub: Hub, name: str) -> set[str]:
    return {path for path in hub.repositories[name].files if "/" not in path}


def check_cut_off(hub: Hub) -> None:
    """The student at the root, all that a resumption needs in `last-checkpoint`."""
    repository = hub.repositories[FULL]
    assert repository.private and not hub.repositories[STUDENT].private
    assert repository.messages[-2:] == [f"Training in progress, step {CUT}{end}" for end in ("", ", checkpoint")]
    saved = {path.removeprefix("last-checkpoint/") for path in repository.files if path.startswith("last-checkpoint/")}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trl_kd_auxiliary.pt", "trainer_state.json"} <= saved
    assert json.loads(repository.files["last-checkpoint/trainer_state.json"])["global_step"] == CUT
    check_root(hub, FULL, {"model.safetensors", "config.json", "tokenizer.json"})


def check_root(hub: Hub, name: str, needed: set[str]) -> None:
    root = files_at_root(hub, name)
    assert needed <= root
    assert not {path for path in root for word in ("auxiliary", "optimizer", "scheduler", "rng_state") if word in path}


def check_card(hub: Hub) -> None:
    """Tags and table of the run, and the results of its evaluation as the Hub reads them."""
    card = hub.card(FULL)
    assert {"trl", "trl-kd", "amm"} <= set(card.data.tags)
    assert card.data.base_model == STUDENT and card.data.datasets == "stories"
    for line in (
        "| `critic` | `value_head` |",
        "| `lmbda` | `0.5` |",
        f"- Teacher: [{TEACHER}](https://huggingface.co/",
    ):
        assert line in card.text
    assert "### Evaluation" in card.text
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["rouge_l"] == 28.14 and "model-index" in card.data.to_dict()


def test_run_is_pushed_resumed_elsewhere_and_used_by_plain_transformers(hub, tmp_path):
    trained = start(hub, tmp_path, "train", "-m", "tests.hub.worker", "train", str(tmp_path))
    check_cut_off(hub)

    resumed = start(hub, tmp_path, "resume", "-m", "tests.hub.worker", "resume", str(tmp_path))
    whole = trained["whole"]
    assert len(whole["losses"]) == STEPS and trained["cut"]["losses"] == whole["losses"][:CUT]
    assert resumed["losses"] == whole["losses"] and resumed["weights"] == whole["weights"]
    assert trained["cut"]["weights"] != whole["weights"]
    check_root(hub, FULL, {"model.safetensors", "config.json", "tokenizer.json", "README.md"})
    check_card(hub)

    check_root(hub, LORA, {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"})
    used = start(hub, tmp_path, "plain", str(Path(__file__).with_name("plain.py")), str(tmp_path), FULL, LORA)
    assert used["ours"] == [] and used["keys"] == []
    assert used["weights"] == whole["weights"] and used["new_tokens"] == 5
    assert used["distance"] < 1e-5 and used["adapters"] > 0  # one float32 matrix product, in another order
    status, message = used["refused"]
    assert status == 401 and FULL in message

    assert {"trl-kd", "amm"} <= set(used["tags"])

    assert hub.unknown == []
    for repository in hub.repositories.values():
        for files in repository.commits.values():
            assert not [path for path, content in files.items() if hub.token.encode() in content]
