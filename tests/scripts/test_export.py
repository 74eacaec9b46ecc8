"""`trl-kd export`: what it writes is the student that was trained, or nothing."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from tests.tiny import make_model
from trl_kd import cli
from trl_kd._compat import keep_4bit_layout
from trl_kd.scripts import export_files, export_merge
from trl_kd.scripts.export import ExportArguments, export, next_commands


IDS = torch.randint(0, 384, (3, 30), generator=torch.Generator().manual_seed(5))
# Merging sums in another order: float32 keeps some 7 digits, which two layers of large weights do not worsen by 100
CLOSE = 1e-4


def save_base(folder, tokenizer, tied=False, hidden_size=32, kind="llama", dtype=torch.float32):
    """A model with its tokenizer, and two ids that end a text."""
    eos = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model = make_model(kind, len(tokenizer), hidden_size, tied=tied, seed=1, eos_token_id=eos)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load(path, **options):
    model = AutoModelForCausalLM.from_pretrained(path, **({"dtype": torch.float32} | options))
    keep_4bit_layout(model)
    return model


def save_adapter(folder, base, model=None, **settings):
    """An adapter with random weights, and the logits that it gives."""
    adapter = get_peft_model(model or load(base), LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | settings)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        adapter.eval().save_pretrained(folder)
        return str(folder), adapter(input_ids=IDS).logits


def distance(expected, found):
    """Largest difference as a share of the largest logit."""
    return ((expected - found).abs().max() / expected.abs().max()).item()


def plain_logits(path, **options):
    """Logits of a model as anyone loads it; nothing is missing and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    with torch.no_grad():
        return model.float()(input_ids=IDS).logits


def names_in(folder):
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tokenizer, tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), tokenizer, tied=request.param), request.param


# Settings of the adapter, and whether head and embeddings stay equal in a model where they are tied
ADAPTERS = {
    "lora": ({"target_modules": "all-linear"}, True),
    "dora": ({"target_modules": "all-linear", "use_dora": True}, True),
    "rslora": ({"use_rslora": True, "lora_alpha": 3}, True),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "embeddings alone": ({"target_modules": ["embed_tokens"]}, False),
    "embeddings and head": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "head in full": ({"modules_to_save": ["lm_head"]}, False),
    "embeddings in full": ({"modules_to_save": ["embed_tokens"]}, False),
    "some tokens": ({"trainable_token_indices": [5, 100, 349]}, True),
    "some tokens of the head": ({"trainable_token_indices": {"lm_head": [5, 100]}}, False),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_export_adapter_is_a_full_model_with_its_logits(base, tmp_path, name):
    (path, tied), (settings, stays_tied) = base, ADAPTERS[name]
    if "ensure_weight_tying" in settings and Version(version("peft")) < Version("0.21"):
        pytest.skip("PEFT 0.18 ties modules that are trained in full, and no adapters")
    adapter, expected = save_adapter(tmp_path / "adapter", path, **settings)
    before = plain_logits(path)
    facts = export(ExportArguments(adapter, str(tmp_path / "out")))
    found = plain_logits(tmp_path / "out")
    assert distance(expected, found) < CLOSE < 0.01 < distance(expected, before)
    assert float(facts["written model against the student: largest difference of a logit"].split()[0]) < 1e-2
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.tie_word_embeddings == (tied and stays_tied)
    assert ("head" in facts) == (tied and not stays_tied)
    assert ("lm_head.weight" in names_in(tmp_path / "out")) == (not (tied and stays_tied))
    assert torch.equal(plain_logits(path), before)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["adapter", "out"]


@pytest.fixture(scope="module")
def wide_base(tokenizer, tmp_path_factory):
    """Wide enough for the blocks of 4-bit weights."""
    pytest.importorskip("bitsandbytes", reason="the `quantization` extra is not installed")
    return save_base(tmp_path_factory.mktemp("wide"), tokenizer, hidden_size=128)


def quantised(**options):
    return BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **options)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"bnb_4bit_quant_type": "fp4"}, {"use_bnb_nested_quant": True}], ids=["nf4", "fp4", "nested"]
)
def test_export_4_bit_merges_into_the_weights_that_were_trained_on(wide_base, tmp_path, options, use_dora):
    names = {"bnb_4bit_quant_type": options.get("bnb_4bit_quant_type", "nf4")}
    config = quantised(load_in_4bit=True, bnb_4bit_use_double_quant="use_bnb_nested_quant" in options, **names)
    model = load(wide_base, quantization_config=config)
    adapter, expected = save_adapter(
        tmp_path / "adapter", wide_base, model, target_modules="all-linear", use_dora=use_dora
    )
    export(ExportArguments(adapter, str(tmp_path / "out"), load_in_4bit=True, **options))
    assert distance(expected, plain_logits(tmp_path / "out")) < CLOSE
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    export(ExportArguments(adapter, str(tmp_path / "original")))
    # Each weight moved by some hundredths of its size
    assert distance(expected, plain_logits(tmp_path / "original")) > 0.1


@pytest.mark.parametrize("use_dora", [False, True])
def test_export_8_bit_merges_into_the_weights_and_tells_of_the_activations(wide_base, tmp_path, use_dora):
    model = load(wide_base, quantization_config=quantised(load_in_8bit=True))
    layers = {name: module for name, module in model.named_modules() if type(module).__name__ == "Linear8bitLt"}
    integers = {name: (layer.weight.data.clone(), layer.weight.SCB.clone()) for name, layer in layers.items()}
    settings = {"target_modules": "all-linear", "use_dora": use_dora}
    adapter, trained = save_adapter(tmp_path / "adapter", wide_base, model, **settings)
    facts = export(ExportArguments(adapter, str(tmp_path / "out"), load_in_8bit=True))
    plain = load(wide_base)
    for name, scales in integers.items():  # the scale of a row belongs to 127
        plain.get_submodule(name).weight.data = scales[0].float() * scales[1][:, None] / 127
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain, adapter)(input_ids=IDS).logits
    found = plain_logits(tmp_path / "out")
    assert distance(expected, found) < CLOSE
    row = facts["8 bits of the activations in training: largest difference of a logit"]
    assert 0.005 < float(row.split("(")[1].split()[0]) < 0.5
    assert distance(trained, found) > 5e-3


def test_export_base_that_is_stored_in_4_bits_needs_no_option(wide_base, tokenizer, tmp_path):
    model = load(wide_base, quantization_config=quantised(load_in_4bit=True))
    model.save_pretrained(tmp_path / "stored")
    tokenizer.save_pretrained(tmp_path / "stored")
    adapter, expected = save_adapter(tmp_path / "adapter", wide_base, model)
    export(ExportArguments(adapter, str(tmp_path / "out"), base_model_name_or_path=str(tmp_path / "stored")))
    assert distance(expected, plain_logits(tmp_path / "out")) < CLOSE
    export(ExportArguments(str(tmp_path / "stored"), str(tmp_path / "plain")))
    assert distance(expected, plain_logits(tmp_path / "plain")) > 0.01


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_export_dtype_is_that_of_the_file_and_the_only_difference(tokenizer, tmp_path, dtype, size):
    path = save_base(tmp_path / "base", tokenizer)
    adapter, expected = save_adapter(tmp_path / "adapter", path)
    export(ExportArguments(adapter, str(tmp_path / "out"), dtype=dtype))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.dtype == getattr(torch, dtype)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).element_size() for name in file.keys()} == {size}
    merged = PeftModel.from_pretrained(load(path), adapter).merge_and_unload()
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    with torch.no_grad():
        assert distance(merged(input_ids=IDS).logits, plain_logits(tmp_path / "out", dtype=torch.float32)) < 1e-6
    assert distance(expected, plain_logits(tmp_path / "out", dtype=torch.float32)) < 0.1


def test_export_full_student_in_another_dtype(tokenizer, tmp_path):
    path = save_base(tmp_path / "student", tokenizer, tied=True, kind="qwen2", dtype=torch.bfloat16)
    export(ExportArguments(path, str(tmp_path / "same")))
    assert AutoConfig.from_pretrained(tmp_path / "same").dtype == torch.bfloat16
    export(ExportArguments(path, str(tmp_path / "wide"), dtype="float32"))
    for folder in ("same", "wide"):
        assert torch.equal(plain_logits(tmp_path / folder), plain_logits(path))
    assert AutoConfig.from_pretrained(tmp_path / "wide").dtype == torch.float32
    assert "lm_head.weight" not in names_in(tmp_path / "wide")


def test_export_base_given_by_hand_replaces_the_one_of_the_adapter(tokenizer, tmp_path):
    path = save_base(tmp_path / "base", tokenizer)
    adapter, expected = save_adapter(tmp_path / "adapter", path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"`base_model_name_or_path` is .*no folder here.*could not be had.*Name an"):
        export(ExportArguments(adapter, str(tmp_path / "out")))
    export(ExportArguments(adapter, str(tmp_path / "out"), base_model_name_or_path=str(tmp_path / "moved")))
    assert distance(expected, plain_logits(tmp_path / "out")) < CLOSE


@pytest.fixture(scope="module")
def plain_adapter(tokenizer, tmp_path_factory):
    """An untied model and an adapter on it."""
    folder = tmp_path_factory.mktemp("plain")
    path = save_base(folder / "base", tokenizer)
    return save_adapter(folder / "adapter", path)[0], path


def test_export_files_serve_other_programs(tokenizer, plain_adapter, tmp_path):
    adapter, path = plain_adapter
    (Path(path) / "tokenizer.model").write_bytes(b"pieces")
    (Path(adapter) / "README.md").write_text("---\nlibrary_name: peft\ntags:\n- trl-kd\n---\n# Student\n")
    export(ExportArguments(adapter, str(tmp_path / "out")))
    out = tmp_path / "out"
    (Path(path) / "tokenizer.model").unlink()
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    assert not list(out.glob("adapter*"))
    assert "library_name: transformers\ntags:\n- trl-kd" in (out / "README.md").read_text()
    assert GenerationConfig.from_pretrained(out).eos_token_id == sorted(
        [tokenizer.eos_token_id, tokenizer.pad_token_id]
    )
    written = AutoTokenizer.from_pretrained(out)
    assert written.get_vocab() == tokenizer.get_vocab()
    assert written.eos_token == tokenizer.eos_token
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": " Hi. "}]
    for messages in (chat, chat[:1]):
        for prompt in (False, True):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            expected = tokenizer.apply_chat_template(messages, **options)
            assert written.apply_chat_template(messages, **options) == expected
    assert "{% generation" not in written.chat_template and "generation -%}" not in written.chat_template
    # What Transformers 4 reads
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    tokenizer_config = json.loads((out / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in tokenizer_config
    assert tokenizer_config["additional_special_tokens"] == ["<|im_start|>"]
    assert tokenizer_config["tokenizer_class"] != "TokenizersBackend"


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, {}),
        ({"rope_parameters": None}, {}),
    ],
)
def test_older_config_has_the_keys_of_both_releases(config, added):
    assert export_files.older_config(config) == config | added


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear"])
def test_older_config_of_scaled_positions_is_read_as_before(tmp_path, kind):
    scaling = {
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        "yarn": {"original_max_position_embeddings": 64},
        "linear": {},
    }[kind]
    config = make_model("llama", 300).config
    config.rope_parameters = {"rope_type": kind, "rope_theta": 5e5, "factor": 8.0} | scaling
    config.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    file = tmp_path / "config.json"
    assert export_files.rewrite(
        file, export_files.older_config, lambda: AutoConfig.from_pretrained(tmp_path).to_dict()
    )
    assert json.loads(file.read_text())["rope_scaling"]["factor"] == 8.0
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == before


def test_rewrite_takes_back_what_changes_the_meaning(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"a": 1}')
    assert not export_files.rewrite(file, lambda config: {"a": 2}, lambda: json.loads(file.read_text())["a"])
    assert file.read_text() == '{"a": 1}'
    assert not export_files.rewrite(file, lambda config: {}, lambda: json.loads(file.read_text())["a"])
    assert file.read_text() == '{"a": 1}'
    assert not export_files.rewrite(tmp_path / "none.json", dict, dict)


def test_plain_template_keeps_the_trimming_of_spaces():
    template = "a {%- generation %} b {% endgeneration -%} c {%generation%}d{% endgeneration +%}"
    plain = "a {%- if true %} b {% endif -%} c {% if true %}d{% endif +%}"
    assert export_files.plain_template(template) == plain
    assert export_files.plain_template("{% for generation in x %}{{ generation }}") == (
        "{% for generation in x %}{{ generation }}"
    )


def test_export_wrong_merge_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    """The fault that tied embeddings invite: the head changes with them."""
    path = save_base(tmp_path / "base", tokenizer, tied=True)
    adapter, _ = save_adapter(tmp_path / "adapter", path, target_modules=["embed_tokens"])
    monkeypatch.setattr(export_merge, "separate_tied_weights", lambda model: None)
    with pytest.raises(RuntimeError, match=r"logits after merging differ .* nothing was kept"):
        export(ExportArguments(adapter, str(tmp_path / "out")))
    assert sorted(item.name for item in tmp_path.iterdir()) == ["adapter", "base"]


def spoil_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def spoil_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (spoil_config, "after writing and loading differ .* nothing was kept"),
        (spoil_weights, "does not load as it should: .*missing_keys.*layers.2"),
    ],
)
def test_export_what_is_written_wrong_leaves_nothing(plain_adapter, tmp_path, monkeypatch, spoil, error):
    write = export_files.write_model

    def wrong(model, tokenizer, folder, sources):
        write(model, tokenizer, folder, sources)
        spoil(folder)

    monkeypatch.setattr(export_files, "write_model", wrong)
    with pytest.raises(RuntimeError, match=error):
        export(ExportArguments(plain_adapter[0], str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())


def test_export_difference_beyond_the_limit_leaves_nothing(plain_adapter, tmp_path):
    with pytest.raises(RuntimeError, match=r"in bfloat16 differ .* where 1e-06 is allowed.*in float32 by `--dtype`"):
        export(ExportArguments(plain_adapter[0], str(tmp_path / "out"), dtype="bfloat16", max_difference=1e-6))
    assert not list(tmp_path.iterdir())


def test_difference_has_the_numbers_by_hand():
    expected = [torch.tensor([[1.0, -4.0]]), torch.tensor([[2.0, 1.0]])]
    found = [torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 2.5]])]
    assert export_merge.Difference.of(expected, found) == export_merge.Difference(1.5, 0.375, 0.5)


def test_probes_read_trained_and_special_tokens_and_the_texts_given(tokenizer, tmp_path):
    path = save_base(tmp_path / "base", tokenizer)
    save_adapter(tmp_path / "adapter", path, trainable_token_indices={"embed_tokens": [340, 7]})
    student = export_merge.find_student(ExportArguments(str(tmp_path / "adapter"), "out"))
    rows = [row[0].tolist() for row in export_merge.probes(student, tokenizer, ["three red apples"])]
    assert tokenizer("three red apples")["input_ids"] in rows
    assert {7, 340, *tokenizer.all_special_ids} <= set(rows[-1])
    assert max(map(max, rows)) < len(tokenizer)
    assert len({token for row in rows for token in row}) > len(tokenizer) / 3


def fails(tmp_path, capsys, *options):
    """The message of a command that is refused, with nothing written."""
    with pytest.raises(SystemExit) as error:
        cli.main(["export", *options])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_export_refusals_say_what_to_do(tokenizer, plain_adapter, wide_base, tmp_path, capsys):
    adapter, base = plain_adapter
    out = ["--output_dir", str(tmp_path / "out")]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "checkpoint-4").mkdir()
    nested = tmp_path / "nested"
    nested.mkdir()
    (nested / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": adapter}))
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    (nameless / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None}))
    cases = [
        (["--model_name_or_path", adapter], "Pass both `--model_name_or_path` and `--output_dir`"),
        (["--model_name_or_path", adapter, "--output_dir", base], "exists and is not empty.*name a new"),
        (["--model_name_or_path", "no/where", *out], "'no/where', which is no folder here.*hf download"),
        (["--model_name_or_path", str(empty), *out], "neither `adapter_config.json` nor.*It has checkpoint-4. Name"),
        (["--model_name_or_path", str(nested), *out], "is not a full model: it has an adapter. Export that one first"),
        (["--model_name_or_path", str(nameless), *out], "names no model under the adapter.*--base_model_name_or_path"),
        (["--model_name_or_path", base, "--base_model_name_or_path", base, *out], "is a full model, not an adapter"),
        (["--model_name_or_path", adapter, "--base_model_name_or_path", wide_base, *out], "does not fit the model"),
        (["--model_name_or_path", adapter, "--dtype", "int4", *out], "`dtype` is 'int4'.*Use one of auto, float32"),
        (["--model_name_or_path", adapter, "--bnb_4bit_quant_type", "q4", *out], "'q4'.*Use nf4 or fp4"),
        (
            ["--model_name_or_path", adapter, "--max_difference", "-1", *out],
            "`max_difference` is -1.0.*no distance is neg.*Set it",
        ),
        (
            ["--model_name_or_path", adapter, "--load_in_4bit", "true", "--load_in_8bit", "true", *out],
            "Pass only one of `--load_in_4bit`",
        ),
    ]
    for options, text in cases:
        message = fails(tmp_path, capsys, *options)
        assert re.search(text, message, flags=re.DOTALL), (text, message)
        assert not (tmp_path / "out").exists()


def test_export_card_of_a_quantised_training_asks_for_the_bits(plain_adapter, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in Path(plain_adapter[0]).glob("adapter*"):
        (adapter / file.name).write_bytes(file.read_bytes())
    (adapter / "README.md").write_text("- load_in_8bit: False\n- load_in_4bit: True\n")
    with pytest.raises(ValueError, match=r"trained on weights in 4 bits.*another model.*Pass `--load_in_4bit true`"):
        export(ExportArguments(str(adapter), str(tmp_path / "out")))
    export(ExportArguments(str(adapter), str(tmp_path / "out"), merge_into_original=True))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_export_weights_stored_in_another_format_are_refused(plain_adapter, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((Path(plain_adapter[1]) / "config.json").read_text())
    stored = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    with pytest.raises(ValueError, match=r"stored in the format 'gptq'.*unquantised model"):
        export(ExportArguments(plain_adapter[0], str(tmp_path / "out"), base_model_name_or_path=str(base)))


def test_export_without_a_tokenizer_is_refused(plain_adapter, tmp_path):
    base = tmp_path / "base"
    load(plain_adapter[1]).save_pretrained(base)
    with pytest.raises(ValueError, match=r"(?s)There is no tokenizer in .* Save the tokenizer into the folder"):
        export(ExportArguments(str(base), str(tmp_path / "out")))


def test_export_command_prints_the_table_and_what_comes_next(plain_adapter, tmp_path, capsys):
    out = tmp_path / "my model"
    assert cli.main(["export", "--model_name_or_path", plain_adapter[0], "--output_dir", str(out)]) == 0
    shown = capsys.readouterr().out
    parameters = sum(parameter.numel() for parameter in load(out).parameters())
    size = (out / "model.safetensors").stat().st_size
    for text in (f"{parameters:,}", f"{size / 1e6:,.1f} MB, float32", "same likeliest token", "100.0%"):
        assert text in shown
    for command in next_commands(ExportArguments(output_dir=str(out)), "float32"):
        assert command in shown
    assert f"convert_hf_to_gguf.py '{out}' --outtype f32" in shown
    assert f"vllm serve '{out}'" in shown


def test_export_push_to_hub_uploads_what_was_written(plain_adapter, tmp_path, capsys, monkeypatch):
    from huggingface_hub import HfApi, RepoUrl

    calls = []

    def create_repo(self, repo_id, private, exist_ok):
        calls.append((repo_id, private, exist_ok))
        return RepoUrl("https://huggingface.co/me/student")

    def upload_folder(self, repo_id, folder_path, commit_message):
        calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    out = str(tmp_path / "student")
    options = ["--model_name_or_path", plain_adapter[0], "--output_dir", out]
    cli.main(["export", *options, "--push_to_hub", "true", "--hub_private_repo", "true"])
    assert calls[0] == ("student", True, True)
    assert calls[1][0] == "me/student" and "model.safetensors" in calls[1][1]
    assert "Uploaded: https://huggingface.co/me/student" in capsys.readouterr().out
