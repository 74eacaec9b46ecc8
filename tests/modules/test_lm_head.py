import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from tests.tiny import make_model
from trl_kd.modules.lm_head import LMHead, check_head, last_hidden_states


VOCAB_SIZE = 50
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
# Heads that do more than multiply: what the config says must reach the logits
SPECIAL = {
    "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8, "query_pre_attn_scalar": 8},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Phi": {},  # a bias
}
# Heads that only multiply, behind backbones of other shapes
PLAIN = {
    "Mistral": {},
    "SmolLM3": {},
    "Gemma3Text": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "OPT": {"word_embed_proj_dim": 16, "ffn_dim": 64},  # narrower at the head than inside
    "Phi3": {},
    "Olmo2": {},
    "GPTNeoX": {},
    "Falcon": {"new_decoder_architecture": True},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def special_model(family):
    options = (SPECIAL | PLAIN)[family]
    model_class = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def every_model():
    for family in FAMILIES:
        for tied in (True, False):
            yield pytest.param(
                lambda family=family, tied=tied: make_model(family, VOCAB_SIZE, tied=tied),
                id=f"{family}-{'tied' if tied else 'untied'}",
            )
    for family in SPECIAL | PLAIN:
        yield pytest.param(lambda family=family: special_model(family), id=family)


def inputs(rows=2, length=7):
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(VOCAB_SIZE, (rows, length), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[0, -2:] = 0  # padded on the right, as batches are
    return {"input_ids": input_ids, "attention_mask": mask}


def assert_computes_own_logits(model, tolerance=1e-5):
    """The same products in float32; a slice of the hidden states may be summed in another order."""
    batch = inputs()
    with torch.no_grad():
        expected = model(**batch).logits
        actual = LMHead.of(model)(last_hidden_states(model, **batch))
    assert actual.shape == expected.shape and expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def losses_of(logits):
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    return (logits * weights).sum()


def gradients_through_head(model):
    model.zero_grad()
    losses_of(LMHead.of(model)(last_hidden_states(model, **inputs()))).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients_of_own_logits(model):
    model.zero_grad()
    losses_of(model(**inputs(), use_cache=False).logits).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_own_gradients(model):
    actual, expected = gradients_through_head(model), gradients_of_own_logits(model)
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        # Relative to the largest entry; LoRA's first factor has none before its second one moves
        size = gradient.abs().max().item()
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-5 * size + 1e-12, msg=name)
    return actual


@pytest.mark.parametrize("build", list(every_model()))
def test_lm_head_of_family_computes_its_own_logits(build):
    model = build()
    assert_computes_own_logits(model)
    check_head(model, "student")


@pytest.mark.parametrize("build", list(every_model()))
def test_lm_head_of_family_sends_the_gradients_of_its_own_logits(build):
    model = build()
    gradients = assert_own_gradients(model)
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    assert model.get_output_embeddings().weight.grad.any() and model.get_input_embeddings().weight.grad.any()


def test_lm_head_of_special_families_reads_scale_cap_and_bias():
    heads = {family: LMHead.of(special_model(family)) for family in SPECIAL}
    assert heads["Gemma2"].soft_cap == 2.0 and heads["Gemma2"].scale == 1.0
    assert heads["Cohere"].scale == 0.25 and heads["Cohere"].soft_cap is None
    assert heads["Granite"].scale == 0.25
    assert heads["Phi"].bias.abs().min() > 0 and heads["Granite"].bias is None


def test_lm_head_literal_numbers_have_the_logits_by_hand():
    head = LMHead(torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]]), torch.tensor([0.5, 0.0, -0.5]))
    hidden = torch.tensor([[1.0, 2.0]])
    assert head(hidden).tolist() == [[5.5, -2.0, 2.5]]
    scaled = LMHead(head.weight, head.bias, scale=0.5)
    assert scaled(hidden).tolist() == [[2.75, -1.0, 1.25]]
    capped = LMHead(head.weight, head.bias, scale=0.5, soft_cap=2.0)
    torch.testing.assert_close(capped(hidden), 2.0 * torch.tanh(torch.tensor([[1.375, -0.5, 0.625]])))


def test_lm_head_cut_keeps_the_first_tokens_and_the_whole_gradient():
    weight, bias = torch.randn(5, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    head = LMHead(weight, bias, scale=0.5, soft_cap=3.0)
    hidden = torch.randn(4, 3)
    assert head.cut(5) is head
    torch.testing.assert_close(head.cut(3)(hidden), head(hidden)[:, :3])
    head.cut(3)(hidden).sum().backward()
    assert weight.grad.shape == (5, 3) and (weight.grad[:3] != 0).all() and not weight.grad[3:].any()
    assert bias.grad.shape == (5,) and (bias.grad[:3] != 0).all() and not bias.grad[3:].any()


def test_lm_head_detached_sends_no_gradient_to_the_head():
    weight, bias = torch.randn(5, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    hidden = torch.randn(4, 3, requires_grad=True)
    head = LMHead(weight, bias, scale=0.5)
    torch.testing.assert_close(head.detach()(hidden), head(hidden))
    head.detach()(hidden).sum().backward()
    assert weight.grad is None and bias.grad is None and hidden.grad.any()


def test_lm_head_hidden_states_of_another_dtype_are_cast_to_the_head():
    head = LMHead(torch.randn(5, 3, dtype=torch.bfloat16))
    assert head(torch.randn(4, 3)).dtype == torch.bfloat16


def test_lm_head_under_autocast_is_in_the_autocast_dtype():
    model = make_model("llama", VOCAB_SIZE)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**inputs()).logits
        actual = LMHead.of(model)(last_hidden_states(model, **inputs()))
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


def test_lm_head_bfloat16_model_computes_its_own_logits():
    model = make_model("qwen2", VOCAB_SIZE).bfloat16()
    assert_computes_own_logits(model, tolerance=2**-8)  # one rounding to 8 bits
    check_head(model, "teacher")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_lm_head_lora_student_sends_gradients_to_the_adapter_alone(family, tied):
    targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    model = make_model(family, VOCAB_SIZE, tied=tied)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    assert_computes_own_logits(model)
    check_head(model, "student")
    gradients = assert_own_gradients(model)
    assert len(gradients) == 2 * 2 * len(targets) + (4 if family == "gpt2" else 0)  # gpt2 has two c_proj a layer
    assert all("lora_" in name and gradient.any() for name, gradient in gradients.items())


def test_lm_head_modules_to_save_is_the_trained_copy():
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(make_model("llama", VOCAB_SIZE, tied=False), config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(0.1)  # as after a step
    assert_computes_own_logits(model)
    check_head(model, "student")
    gradients = assert_own_gradients(model)
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    assert gradients[name].any() and "base_model.model.lm_head.original_module.weight" not in gradients


def test_lm_head_lora_on_the_head_is_refused_by_name():
    # At the start the adapter is zero and the logits agree: no comparison of numbers can find it
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = get_peft_model(make_model("llama", VOCAB_SIZE, tied=False), config)
    with pytest.raises(
        NotImplementedError, match=r"student .*\(`llama`\) has a PEFT adapter on its output head.*`target_modules`"
    ):
        check_head(model, "student")


def test_lm_head_prompt_tuning_is_refused_by_name():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(make_model("llama", VOCAB_SIZE), config)
    with pytest.raises(
        NotImplementedError, match=r"student .*\(`llama`\) is not supported: .* 9 positions for 6 tokens"
    ):
        check_head(model, "student")


class ScaledLogits(LlamaForCausalLM):
    """A model of a kind that the head object can't know."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output


class NoDecoder(LlamaForCausalLM):
    def get_decoder(self):
        raise AttributeError("this model has no decoder")


def test_check_head_logits_that_are_scaled_are_refused_by_name():
    model = ScaledLogits(make_model("llama", VOCAB_SIZE).config)
    expected = (
        r"The teacher ScaledLogits \(`llama`\) is not supported: its logits differ from head\(hidden states\) by "
        r"9\.9e-03 of their size\. .*Use a decoder-only model"
    )
    with pytest.raises(NotImplementedError, match=expected):
        check_head(model, "teacher")


def test_check_head_model_without_decoder_is_refused_by_name():
    model = NoDecoder(make_model("llama", VOCAB_SIZE).config)
    with pytest.raises(NotImplementedError, match=r"student NoDecoder .*: this model has no decoder\. The losses"):
        check_head(model, "student")


def test_check_head_vocabulary_of_five_tokens_is_enough():
    check_head(make_model("llama", 5), "student")


def test_check_head_leaves_the_model_as_it_was():
    model = make_model("llama", VOCAB_SIZE).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_head(model, "student")
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_lm_head_of_backbone_alone_raises():
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings.*Use a causal language model"):
        LMHead.of(make_model("llama", VOCAB_SIZE).model)


@pytest.mark.parametrize("family", FAMILIES)
def test_last_hidden_states_are_the_backbone_s_and_leave_no_hook(family):
    model = make_model(family, VOCAB_SIZE)
    with torch.no_grad():
        hidden = last_hidden_states(model, **inputs())
        assert torch.equal(hidden, model.base_model(**inputs(), use_cache=False).last_hidden_state)
    assert hidden.shape == (2, 7, 32)
    assert not model.get_decoder()._forward_hooks


def test_last_hidden_states_failing_forward_leaves_no_hook():
    model = make_model("llama", VOCAB_SIZE)
    with pytest.raises(IndexError):
        last_hidden_states(model, input_ids=torch.tensor([[VOCAB_SIZE]]))
    assert not model.get_decoder()._forward_hooks


@pytest.mark.parametrize("family", [*FAMILIES, "Gemma2", "OPT"])
def test_last_hidden_states_compute_the_logits_of_one_position(family):
    model = special_model(family) if family in SPECIAL | PLAIN else make_model(family, VOCAB_SIZE)
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    last_hidden_states(model, **inputs())
    assert shapes == [(2, 1, VOCAB_SIZE)]


def test_last_hidden_states_with_gradient_checkpointing_send_the_same_gradients():
    model = make_model("llama", VOCAB_SIZE).train()
    expected = gradients_through_head(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    actual = gradients_through_head(model)
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("bits", [4, 8])
def test_lm_head_quantised_head_is_dequantised(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_model("llama", 64, hidden_size=64, tied=False).save_pretrained(tmp_path)
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(
        llm_int8_skip_modules=["none"], **(options if bits == 4 else {"load_in_8bit": True, "llm_int8_threshold": 0.0})
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    # In evaluation, bitsandbytes repacks 4-bit weights for fast products on some CPUs, past recognition
    model.train()
    assert not model.lm_head.weight.is_floating_point()
    head = LMHead.of(model)
    assert head.weight.shape == (64, 64) and head.weight.dtype == torch.float32
    original = AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight
    error = (head.weight - original).norm() / original.norm()
    assert error < (0.15 if bits == 4 else 0.02)
    with torch.no_grad():
        hidden = last_hidden_states(model, input_ids=torch.arange(1, 8).unsqueeze(0))
        expected = model(input_ids=torch.arange(1, 8).unsqueeze(0)).logits
    # 8 bit rounds the hidden states too, to 1/127 of their largest entry
    tolerance = (1e-5 if bits == 4 else 0.02) * expected.abs().max().item()
    torch.testing.assert_close(LMHead.of(model)(hidden), expected, rtol=0, atol=tolerance)
