"""The documentation says what is true: blocks that run, names that exist, and no public name left out."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

from tests.trainer.runs import config, logged, pair, tiny_dataset
from trl_kd import losses
from trl_kd.modules import LMHead


ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))


def test_extending_block_trains(tokenizer, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), flags=re.S)
    namespace = {}
    exec(block, namespace)
    args = config(tmp_path, lmbda=0.5, temperature=0.0)
    student, teacher = pair(tokenizer)
    trainer = namespace["HalfAndHalfTrainer"](student, teacher, args, tiny_dataset(), processing_class=tokenizer)
    trainer.train()
    first = trainer.state.log_history[0]
    mixed = [
        (first[f"kd/{source}/reverse_kl"] + first[f"kd/{source}/jsd"]) / 2 for source in ("off_policy", "on_policy")
    ]
    assert logged(trainer, "loss")[0] == pytest.approx(sum(mixed) / 2, rel=1e-5)
    assert trainer.evaluate(tiny_dataset(4))["eval_loss"] > 0


@pytest.mark.parametrize("page", ["README.md", "docs/amm_trainer.md"])
def test_example_of_a_page_trains_on_tiny_models(
    page, conversational_dataset, student_path, teacher_path, tmp_path, monkeypatch
):
    """The block as it stands, but for the names of models, the size of the run and the 4 bits of the teacher."""
    block = next(b for b in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S) if "AMMTr" in b)
    small = "max_steps=1, max_completion_length=4, per_device_train_batch_size=2, use_cpu=True, report_to=[], "
    block = block.replace("AMMConfig(", f"AMMConfig({small}").replace('{"load_in_4bit": True}', "None")
    block = re.sub(r'(?<!_)model="[^"]*"', f"model={student_path!r}", block)
    block = re.sub(r'teacher_model="[^"]*"', f"teacher_model={teacher_path!r}", block)
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: conversational_dataset)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(block, namespace)
    assert namespace["trainer"].state.global_step == 1
    trained = [name for name, p in namespace["trainer"].model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("name", [name for name in losses.__all__ if name not in ("LinearLoss", "Term")])
def test_example_of_a_loss_gives_what_it_says(name):
    text = re.sub(r"^ *```(python)?$", "", getattr(losses, name).__doc__, flags=re.M)
    assert ">>>" in text
    names = {"torch": torch, "LMHead": LMHead} | {other: getattr(losses, other) for other in losses.__all__}
    example = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0


@pytest.mark.parametrize("package", ["trl_kd", "trl_kd.losses", "trl_kd.modules", "trl_kd.evaluation"])
def test_every_public_name_is_documented(package):
    text = "\n".join(page.read_text() for page in DOCS)
    module = importlib.import_module(package)
    missing = [
        name for name in module.__all__ if not name.startswith("__") and not re.search(rf"`[\w.]*\b{name}\b", text)
    ]
    assert missing == []
    undocumented = [name for name in module.__all__ if not name.startswith("__") and not getattr(module, name).__doc__]
    assert undocumented == []


@pytest.mark.parametrize("page", [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_between_pages_exist(page):
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_paper_index_names_exist():
    text = (ROOT / "docs" / "paper_index.md").read_text()
    names = set(re.findall(r"`(losses|modules)\.(\w+)`", text))
    assert names
    for package, name in names:
        assert hasattr(importlib.import_module(f"trl_kd.{package}"), name), name
    for path in re.findall(r"`(tests/[\w/]+(?:\.py)?)/?`", text):
        assert (ROOT / path).exists(), path
