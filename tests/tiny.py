"""Tokenizers and models small enough to build in a test, with nothing downloaded."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHATML_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

SEED_TEXT = """\
Once upon a time a little fox lived near the river. Every morning the fox went to the water and looked for fish.
One day the fox met a red bird. The bird said, "Hello, fox! Why are you sad today?" The fox was hungry and cold.
"I cannot find any fish," said the fox. The bird wanted to help, so they walked together through the green forest.
What is the colour of the sky? The sky is blue. What is the colour of the grass? The grass is green and soft.
user system assistant. How many apples are there? There are three apples and two pears on the table in the kitchen.
"""


def make_tokenizer(seed_text: str | None = None, vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """
    Byte-level BPE with a ChatML template, trained on `seed_text`: every string is representable, no BOS, EOS
    `<|im_end|>`, padding `<|endoftext|>`. Another text gives another vocabulary, of 259 to `vocab_size` tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([seed_text or SEED_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[IM_START],
        chat_template=CHATML_TEMPLATE,
    )


def make_model(
    kind: str,
    vocab_size: int,
    hidden_size: int = 32,
    layers: int = 2,
    tied: bool | None = None,
    seed: int = 0,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """
    Random float32 causal LM of the family `kind` ("llama", "qwen2", "qwen3" or "gpt2"), without dropout, in eval mode.

    Weights are larger than usual, and biases and norms random, so that next-token distributions are far from uniform
    and a forgotten bias or norm shows. `tied=None` keeps the family's default. The global RNG is left alone.
    """
    common = {
        "vocab_size": vocab_size,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "initializer_range": 0.3,
    }
    if tied is not None:
        common["tie_word_embeddings"] = tied
    if kind == "gpt2":
        config = GPT2Config(
            n_embd=hidden_size,
            n_layer=layers,
            n_head=4,
            n_positions=512,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            **common,
        )
        model_class = GPT2LMHeadModel
    else:
        config_class, model_class = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        }[kind]
        if kind == "qwen3":
            common["head_dim"] = hidden_size // 4
        config = config_class(
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            **common,
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
