"""Shared fixtures. Nothing is downloaded: models and tokenizers are built here, once per session."""

import os


# Read by the libraries when they are imported, so this comes before the imports below.
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "CI"):
    os.environ[_name] = "1"
os.environ["WANDB_MODE"] = "disabled"
# The tests are a CPU's; bitsandbytes would load onto a GPU that it sees
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402

from tests.tiny import make_model, make_tokenizer  # noqa: E402


torch.set_num_threads(1)


def _save_llama(folder, tokenizer, hidden_size, seed):
    model = make_model(
        "llama",
        len(tokenizer),
        hidden_size=hidden_size,
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def student_path(tmp_path_factory, tokenizer):
    return _save_llama(tmp_path_factory.mktemp("student"), tokenizer, hidden_size=32, seed=1)


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory, tokenizer):
    return _save_llama(tmp_path_factory.mktemp("teacher"), tokenizer, hidden_size=48, seed=2)


@pytest.fixture(scope="session")
def prompt_completion_dataset():
    subjects = ["fox", "bird", "river", "sky", "grass", "apple", "forest", "fish"]
    colours = ["red", "blue", "green", "cold"]
    rows = [
        {"prompt": f"What is the colour of the {subject}?", "completion": f" The {subject} is {colour}."}
        for subject in subjects
        for colour in colours
    ]
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def conversational_dataset(prompt_completion_dataset):
    """Rows of `messages`, every second one with an earlier turn and a system message."""
    rows = []
    for index, row in enumerate(prompt_completion_dataset):
        before = [
            {"role": "system", "content": "Help the fox."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello, fox!"},
        ]
        turn = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"].strip()},
        ]
        rows.append({"messages": (before if index % 2 else []) + turn})
    return Dataset.from_list(rows)
