"""A set-up with which nothing is wrong, on disk: models that have learned the data, and commands on them."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from tests.tiny import make_model
from trl_kd import cli


SUBJECTS = ("fox", "bird", "river", "sky", "grass", "apple", "forest", "fish")
COLOURS = ("red", "blue", "green", "cold")


def conversations(num_rows: int = 32) -> list[dict[str, Any]]:
    """Questions with the same answer each time."""
    rows = []
    for i in range(num_rows):
        subject, colour = SUBJECTS[i % 8], COLOURS[i % 8 // 2]
        question = f"What is the colour of the {subject}{'?' * (1 + i // 8)}"
        answer = f"The {subject} is {colour}."
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def learned(tokenizer: Any, hidden_size: int, seed: int, steps: int, rows: list[dict[str, Any]] | None = None) -> Any:
    """A model that has read the answers for some steps."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = make_model("llama", len(tokenizer), hidden_size=hidden_size, seed=seed, **ids)
    for parameter in model.parameters():
        parameter.data.mul_(0.3 if parameter.ndim > 1 else 1.0)
    texts = [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in rows or conversations()]
    starts = [
        len(tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False))
        for row in rows or conversations()
    ]
    width = max(map(len, texts))
    input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in texts])
    # Trained as in the run: the answer, with the end of its turn and without the line break behind it
    labels = torch.full_like(input_ids, -100)
    for row, (ids, start) in enumerate(zip(texts, starts, strict=True)):
        labels[row, start : len(ids) - 1] = input_ids[row, start : len(ids) - 1]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        model(
            input_ids=input_ids, attention_mask=(input_ids != tokenizer.pad_token_id).long(), labels=labels
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def save(folder: Path, *parts: Any) -> str:
    """A model with its tokenizer."""
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a file."""
    Dataset.from_list(rows).to_json(path)
    return path


def options(student: str, teacher: str, dataset: Path | str, folder: Path, **changes: Any) -> list[str]:
    """Options of a short run that suits these models."""
    settings = {
        "model_name_or_path": student,
        "teacher_model_name_or_path": teacher,
        "dataset_name": dataset,
        "output_dir": folder / "out",
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        "max_completion_length": 24,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        **changes,
    }
    return [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]


def checked(capsys: Any, method: str, arguments: list[str]) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Exit status, findings by name, and the worst verdict, by way of `--json`."""
    capsys.readouterr()
    status = cli.main(["check", method, *arguments, "--json", "true"])
    told = json.loads(capsys.readouterr().out, parse_constant=lambda name: 1 / 0)
    return status, {finding["name"]: finding for finding in told["findings"]}, told["verdict"]
