"""The documentation says what is true: blocks that run, names that exist, and no public name left out."""

import dataclasses
import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

from tests.tiny import make_model, make_tokenizer
from tests.trainer.runs import config, logged, pair, tiny_dataset
from trl_kd import DSKDConfig, KDConfig, SparseTDConfig, SparseTDTrainer, losses
from trl_kd.modules import LMHead
from trl_kd.trainer import dskd_config, sparse_td_config


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


@pytest.fixture
def other_teacher_path(tmp_path):
    """A teacher with a vocabulary and a chat template of its own."""
    tokenizer = make_tokenizer("Where does the red bird sleep? On a tree near the water. " * 3, vocab_size=330)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<turn>")
    teacher = make_model("qwen2", len(tokenizer), hidden_size=48, seed=3, eos_token_id=tokenizer.eos_token_id)
    for part in (teacher, tokenizer):
        part.save_pretrained(tmp_path / "other teacher")
    return str(tmp_path / "other teacher")


@pytest.mark.parametrize(
    ("page", "method"),
    [
        ("README.md", "AMM"),
        ("docs/amm_trainer.md", "AMM"),
        ("docs/dskd_trainer.md", "DSKD"),
        ("docs/sparse_td_trainer.md", "SparseTD"),
    ],
)
def test_example_of_a_page_trains_on_tiny_models(
    page, method, conversational_dataset, student_path, teacher_path, other_teacher_path, tmp_path, monkeypatch
):
    """
    The block as it stands, but for the names of models, the size of the run and the 4 bits of the teacher; DSKD's
    across two tokenizers, as on its page.
    """
    teacher_path = other_teacher_path if method == "DSKD" else teacher_path
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    block = next(block for block in blocks if f"{method}Trainer" in block)
    small = "max_steps=1, max_completion_length=4, per_device_train_batch_size=2, use_cpu=True, report_to=[], "
    block = block.replace(f"{method}Config(", f"{method}Config({small}").replace('{"load_in_4bit": True}', "None")
    block = re.sub(r'(?<!_)model="[^"]*"', f"model={student_path!r}", block)
    block = re.sub(r'teacher_model="[^"]*"', f"teacher_model={teacher_path!r}", block)
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: conversational_dataset)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(block, namespace)
    assert namespace["trainer"].state.global_step == 1
    trained = [name for name, p in namespace["trainer"].model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert getattr(namespace["trainer"], "is_dual", False) == (method == "DSKD")


def test_example_script_of_sparse_td_trains_with_a_teacher_and_from_a_cache(
    conversational_dataset, student_path, teacher_path, tmp_path, monkeypatch
):
    """The script as it stands, but for the names of models and the size of the run."""
    script = (ROOT / "examples" / "sparse_td.py").read_text()
    for name, path in (("Qwen/Qwen2.5-0.5B-Instruct", student_path), ("Qwen/Qwen2.5-1.5B-Instruct", teacher_path)):
        assert script.count(f'"{name}"') == 1
        script = script.replace(f'"{name}"', repr(path))
    small = "use_cpu=True, report_to=[], logging_steps=1, max_steps=2"
    script = script.replace("max_steps=500", small).replace('{"dtype": "bfloat16"}', "None")

    def load_dataset(path, name=None, split=None, **kwargs):
        return conversational_dataset if split else {"train": conversational_dataset}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    trainers = []
    original = SparseTDTrainer.train
    monkeypatch.setattr(SparseTDTrainer, "train", lambda self: (trainers.append(self), original(self)))
    exec(script, {})
    live, cached = (logged(trainer, "loss") for trainer in trainers)
    # The same rows and sets but for the rounding of the cache to 8 bits, which may move the end of a set by a token
    assert len(live) == 2 and cached == pytest.approx(live, rel=1e-2)
    for name in ("Qwen2.5-0.5B-SparseTD", "Qwen2.5-0.5B-SparseTD-cached"):
        assert (tmp_path / name / "adapter_model.safetensors").is_file()


def test_loss_of_your_own_on_the_page_of_sparse_td_trains(tokenizer, tmp_path):
    text = (ROOT / "docs" / "sparse_td_trainer.md").read_text()
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "Transitions" in block)
    namespace = {}
    exec(block, namespace)
    settings = {name: value for name, value in vars(config(tmp_path)).items() if name in ("max_steps", "use_cpu")}
    args = SparseTDConfig(
        str(tmp_path), logging_steps=1, report_to=[], save_strategy="no", gauge="max", tail_weight=1.0, **settings
    )
    student, teacher = pair(tokenizer)
    rows = tiny_dataset().remove_columns("completion")  # the teacher writes, so that tokens are in its sets
    objective = namespace["huber_teacher_reward"]
    trainer = SparseTDTrainer(student, teacher, args, rows, processing_class=tokenizer, objective=objective)
    trainer.train()
    first = trainer.state.log_history[0]
    values = first["kd/off_policy/objective"], first["kd/off_policy/tail"]
    assert min(values) > 0 and first["loss"] == pytest.approx(sum(values), rel=1e-5)


@pytest.mark.parametrize(
    ("page", "config_class"), [("dskd_trainer", DSKDConfig), ("sparse_td_trainer", SparseTDConfig)]
)
def test_options_of_a_method_are_on_its_page(page, config_class):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    shared = {field.name for field in dataclasses.fields(KDConfig)}
    own = [field.name for field in dataclasses.fields(config_class) if field.name not in shared]
    assert [name for name in own if not re.search(rf"`{name}\b", text)] == []


def test_presets_of_dskd_are_those_of_the_table_on_its_page():
    text = (ROOT / "docs" / "dskd_trainer.md").read_text()
    table = text[text.index("| field | `preset=") :].split("\n\n")[0].splitlines()
    shown = re.findall(r'preset="(\w+)"', table[0])
    rows = {cells[1].strip(" `"): cells[2:] for cells in (row.split("|") for row in table[2:])}
    presets = dskd_config.PRESETS
    assert shown == list(presets) and set(rows) == set().union(*presets.values())
    for number, decided in enumerate(presets.values()):
        for name, value in decided.items():
            # The first word of a cell: what follows are exceptions
            assert rows[name][number].split("`")[1].strip('"') == str(value), name


def test_presets_of_sparse_td_are_those_of_the_table_on_its_page():
    text = (ROOT / "docs" / "sparse_td_trainer.md").read_text()
    table = text[text.index("| field | `preset=") :].split("\n\n")[0].splitlines()
    rows = {cells[1].strip(" `"): cells[2:] for cells in (row.split("|") for row in table[2:])}
    presets = sparse_td_config.PRESETS
    assert re.findall(r'preset="(\w+)"', table[0]) == list(presets)
    for number, decided in enumerate(presets.values()):
        shown = {name: cells[number].strip(" `").replace('"', "'") for name, cells in rows.items()}
        assert shown == {name: repr(value) for name, value in decided.items()}


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
    names = set(re.findall(r"`(losses|modules|data)\.(\w+)`", text))
    assert names
    for package, name in names:
        assert hasattr(importlib.import_module(f"trl_kd.{package}"), name), name
    for path in re.findall(r"`(tests/[\w/]+(?:\.py)?)/?`", text):
        assert (ROOT / path).exists(), path
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in tests] == []
