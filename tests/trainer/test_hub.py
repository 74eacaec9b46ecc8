"""What goes to the Hub, with a stand-in for its client: student, tokenizer and card; checkpoints when complete."""

import os
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.trainer.runs import ProjectingTrainer, config, pair, tiny_dataset
from trl_kd.trainer.checkpoints import MARKER


class HubStandIn:
    """Keeps, for each upload, the names of the files that would be sent."""

    def __init__(self):
        self.uploads = []

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=f"somebody/{repo_id}")

    def upload_folder(self, *, folder_path, ignore_patterns=(), path_in_repo=None, **kwargs):
        paths = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        sent = {path for path in paths if not any(fnmatch(path, pattern) for pattern in ignore_patterns or ())}
        self.uploads.append((path_in_repo, sent))
        return SimpleNamespace(done=lambda: True, result=lambda: None)


@pytest.fixture
def hub(monkeypatch):
    stand_in = HubStandIn()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: stand_in)
    return stand_in


def train(tokenizer, folder, **overrides):
    student, teacher = pair(tokenizer)
    args = config(folder, save_strategy="steps", save_steps=1, log_completions=True, **overrides)
    trainer = ProjectingTrainer(student, teacher, args, tiny_dataset(), processing_class=tokenizer)
    trainer.train()
    return trainer


def test_push_to_hub_sends_student_tokenizer_and_card_alone(tokenizer, tmp_path, hub):
    trainer = train(tokenizer, tmp_path)
    assert (tmp_path / "_completions").exists()
    trainer.push_to_hub()
    ((_, sent),) = hub.uploads
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= sent
    assert not any("auxiliary" in name or "completions" in name or "optimizer" in name for name in sent)
    assert all(os.sep not in name for name in sent)


def test_push_during_training_sends_checkpoints_when_they_are_complete(tokenizer, tmp_path, hub):
    train(tokenizer, tmp_path, push_to_hub=True, hub_strategy="checkpoint")
    checkpoints = [sent for path, sent in hub.uploads if path == "last-checkpoint"]
    assert len(checkpoints) == 2
    for sent in checkpoints:
        assert {MARKER, "trl_kd_auxiliary.pt", "optimizer.pt", "rng_state.pth"} <= sent


@pytest.mark.parametrize("is_pushed", [False, True])
def test_no_token_is_in_what_is_saved_and_the_run_keeps_it(tokenizer, tmp_path, hub, is_pushed):
    student, teacher = pair(tokenizer)
    kwargs = {"hub_token": "hf_secret", "teacher_model_init_kwargs": {"token": "hf_secret", "dtype": "float32"}}
    args = config(tmp_path, save_strategy="steps", save_steps=1, push_to_hub=is_pushed, **kwargs)
    trainer = ProjectingTrainer(student, teacher, args, tiny_dataset(), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == "hf_secret" and trainer.args.teacher_model_init_kwargs["token"] == "hf_secret"
    saved = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.name == "training_args.bin" for path in saved) == 3
    assert not [path for path in saved if b"hf_secret" in path.read_bytes()]
    assert bool(hub.uploads) == is_pushed


def test_resume_from_a_name_that_is_not_on_the_hub_raises(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    trainer = ProjectingTrainer(student, teacher, config(tmp_path), tiny_dataset(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="`nobody/nothing`, which is neither a folder nor a repository on the Hub"):
        trainer.train(resume_from_checkpoint="nobody/nothing")
