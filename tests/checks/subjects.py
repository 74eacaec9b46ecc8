"""Runs that are checked, and tokenizers and templates to plant faults with."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHATML_TEMPLATE, SEED_TEXT, make_tokenizer
from trl_kd.checks.subject import Subject
from trl_kd.checks.text import text_findings
from trl_kd.trainer.amm_config import AMMConfig
from trl_kd.trainer.dskd_config import DSKDConfig
from trl_kd.trainer.sparse_td_config import SparseTDConfig


CONFIGS = {"amm": AMMConfig, "dskd": DSKDConfig, "sparse-td": SparseTDConfig}

LLAMA_TOKENS = ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

# As in Llama 3: BOS, a header for each role, and <|eot_id|> behind each message
LLAMA_TEMPLATE = (
    "{{- '<|begin_of_text|>' -}}"
    "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
)

# As in Qwen3: ChatML whose generation prompt has an empty block if thinking is switched off
THINKING_TEMPLATE = CHATML_TEMPLATE + (
    "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
)

# The same with thinking off unless it is asked for
QUIET_TEMPLATE = CHATML_TEMPLATE + (
    "{%- if add_generation_prompt and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
)

# As in models that always reason
OPEN_TEMPLATE = CHATML_TEMPLATE + "{%- if add_generation_prompt -%}{{- '<think>\n' -}}{%- endif -%}"


def llama_tokenizer(vocab_size=384):
    """Byte-level BPE with the special tokens and the template of Llama 3, whose generation ends by `<|eot_id|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=LLAMA_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SEED_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        chat_template=LLAMA_TEMPLATE,
    )


def with_template(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def conversations(count=10, **columns):
    rows = []
    for number in range(count):
        turns = [{"role": "user", "content": f"Sky {number}?"}, {"role": "assistant", "content": "The sky is blue."}]
        rows.append({"messages": turns, **columns})
    return rows


def pairs(count=10):
    return [{"prompt": f"What is {number}?", "completion": " The fox was cold."} for number in range(count)]


def subject_of(method="amm", tokenizer=None, teacher_tokenizer=..., rows=None, options=None, **fields):
    """
    A run in which nothing is wrong, but for what is passed: `options` of the config, `fields` of the subject.
    """
    tokenizer = tokenizer or make_tokenizer()
    teacher_tokenizer = make_tokenizer() if teacher_tokenizer is ... else teacher_tokenizer
    config = CONFIGS[method](
        output_dir="unused", **{"max_length": 128, "max_completion_length": 32, **(options or {})}
    )
    rows = conversations() if rows is None else rows
    own = {
        "student_rows": len(tokenizer),
        "teacher_rows": None if teacher_tokenizer is None else len(teacher_tokenizer),
        "eos_token_ids": [tokenizer.eos_token_id],
        "teacher_eos_token_ids": None if teacher_tokenizer is None else [teacher_tokenizer.eos_token_id],
        "student_context": 512,
        "teacher_context": 512,
    }
    return Subject(method, config, tokenizer, teacher_tokenizer, rows=rows, **{**own, **fields})


def findings_of(*args, **kwargs):
    """All findings of a subject, by name."""
    return {finding.name: finding for finding in text_findings(subject_of(*args, **kwargs))}


def bad(findings):
    """Verdicts that aren't fine, by name."""
    return {name: finding.verdict for name, finding in findings.items() if finding.verdict != "fine"}
