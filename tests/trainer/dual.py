"""
Dual-space runs on tiny models with one tokenizer or two, and their steps once more in float64, token by token.

`Recorder` keeps what each optimizer step saw and the gradients that it left; `plain_step` works them out again from
the models' own hidden states, without selection, chunks, padding or the package.
"""

import copy
import gc
import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.references.dual_space import cross_model_attention, project, sorted_distance, standard_deviation
from tests.tiny import make_model
from tests.trainer.runs import config, weights
from trl_kd import DSKDConfig, DSKDTrainer


# The Trainer collects garbage whenever it starts; the libraries are never garbage, and take half a second to look at
gc.freeze()

OTHER_TEXT = "the cat sat on the mat. a blue sky and green grass. What is the fox bird river? three of the apples " * 3

# Other markers than ChatML, another end of turn, and a BOS that the template writes
INSTRUCT_TEMPLATE = (
    "{{- '<s>' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<answer>' -}}{%- generation -%}{{- message['content'] + '</s>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- '<ask>' + message['role'] + ': ' + message['content'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<answer>' -}}{%- endif -%}"
)

SOURCES = ("off_policy", "on_policy")

# What the versions of the method say where nothing else is asked for
VERSIONS = {
    "v1": {
        "label": "gold",
        "gate": False,
        "gated_mean": False,
        "bias": True,
        "recomputed": False,
        "teacher_space_divergence": "forward_kl",
    },
    "v2": {"label": "teacher_top1", "gate": True, "gated_mean": True, "bias": False, "recomputed": True},
    "context": {"label": "gold", "gate": False, "gated_mean": False, "bias": False, "recomputed": True},
}


def make_other_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """The teacher's: other merges, other special tokens, a BOS before a text, no pad token, another template."""
    special_tokens = ["<s>", "</s>", "<ask>", "<answer>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([OTHER_TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<ask>", "<answer>"],
        chat_template=INSTRUCT_TEMPLATE,
    )


def make_spaced_tokenizer() -> PreTrainedTokenizerFast:
    """The teacher's, like those of SentencePiece: bytes where it knows no word, and a space before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator([OTHER_TEXT], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    learned = json.loads(tokenizer.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    merges = [tuple(merge) for merge in learned["merges"]]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer.model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    special_tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens, chat_template=INSTRUCT_TEMPLATE)


def dual_config(output_dir: Any, **overrides: Any) -> DSKDConfig:
    """Settings of a short run; `tests.trainer.runs.config` for this method."""
    settings = {name: value for name, value in vars(config(output_dir)).items() if name in _GIVEN}
    return DSKDConfig(**(settings | {"learning_rate": 1e-3} | overrides))


_GIVEN = (
    *("output_dir", "max_steps", "per_device_train_batch_size", "max_completion_length", "logging_steps"),
    *("save_strategy", "report_to", "use_cpu", "gradient_checkpointing", "disable_tqdm", "max_grad_norm"),
    "train_sampling_strategy",
)


def same_tokens(student_tokenizer: Any, teacher_tokenizer: Any) -> dict[int, int]:
    """The student's id of each of the teacher's tokens that it has; both byte-level."""
    own, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    found = {theirs[token]: own[token] for token in theirs if token in own}
    return found | {teacher_tokenizer.eos_token_id: student_tokenizer.eos_token_id}


def dual_pair(
    student_tokenizer: Any,
    teacher_tokenizer: Any = None,
    kinds: tuple[str, str] = ("llama", "qwen2"),
    noise: float = 0.02,
    teacher_size: int = 48,
) -> tuple[Any, Any]:
    """
    A student and a teacher whose head reads a rotation of the student's space and some noise, so that at the start
    some projected states lead to the right tokens, and some do not.
    """
    teacher_tokenizer = teacher_tokenizer or student_tokenizer

    def make(kind, tokenizer, size, seed):
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        return make_model(kind, len(tokenizer), hidden_size=size, seed=seed, **ids)

    student = make(kinds[0], student_tokenizer, 32, 1)
    teacher = make(kinds[1], teacher_tokenizer, teacher_size, 2)
    found = same_tokens(student_tokenizer, teacher_tokenizer)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        head, own = teacher.get_output_embeddings().weight, student.get_output_embeddings().weight
        mixing = torch.randn(32, teacher_size, generator=generator) / 6
        head[list(found)] = own[list(found.values())] @ mixing
        head.add_(noise * torch.randn(head.shape, generator=generator))
    return student, teacher


def words_only(tokenizer: Any) -> dict[str, Any]:
    """Options of a rollout that writes ASCII and ends: a loop over characters can follow it."""
    spelled = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    kept = {i for i, text in enumerate(spelled) if text.isascii() and text.isprintable() and len(text) > 1}
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    return {"suppress_tokens": sorted((set(range(len(tokenizer))) - kept) | special)}


def short_rows(num_rows: int = 16) -> Dataset:
    """Few trained tokens of different numbers, for loops over them."""
    words = ["fox", "bird", "river", "sky", "grass", "apple", "forest", "fish"]
    answers = [" The sky is blue", " green", " three red apples", " the cat sat on"]
    return Dataset.from_list(
        [
            {"prompt": f"What is the {words[i % 8]}" + "?" * (i % 3), "completion": answers[i % 4]}
            for i in range(num_rows)
        ]
    )


class Recorder(DSKDTrainer):
    """Keeps, for each optimizer step: all weights before it, its rows on both sides, and its gradients."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.record = []

    def get_batch_samples(self, *args):
        before = {"student": weights(self.model), "modules": weights(self.auxiliary.modules)}
        batches, count = super().get_batch_samples(*args)
        if batches:
            kept = [{name: batch[name].clone() for name in batch if name in _COLUMNS} for batch in batches]
            self.record.append(SimpleNamespace(**before, batches=kept, gradients={}))
        return batches, count

    def _before_optimizer_step(self):
        student = self.accelerator.unwrap_model(self.model).named_parameters()
        modules = ((f"aux.{name}", value) for name, value in self.auxiliary.modules.named_parameters())
        self.record[-1].gradients = {
            name: value.grad.clone() for name, value in [*student, *modules] if value.grad is not None
        }
        super()._before_optimizer_step()


_COLUMNS = ("input_ids", "attention_mask", "labels", "is_on_policy")
_COLUMNS += tuple(f"teacher_{name}" for name in _COLUMNS[:3])


def make_trainer(
    models: tuple,
    tokenizers: tuple,
    folder: Any,
    rows: Any = None,
    eval_rows: Any = None,
    trainer_class: type[DSKDTrainer] = DSKDTrainer,
    options: dict[str, Any] | None = None,
    **overrides: Any,
) -> DSKDTrainer:
    """A trainer on rows; `options` are for its constructor, the rest for its configuration."""
    rows = short_rows() if rows is None else rows
    return trainer_class(
        *models,
        dual_config(folder, **overrides),
        Dataset.from_list(rows) if isinstance(rows, list) else rows,
        Dataset.from_list(eval_rows) if isinstance(eval_rows, list) else eval_rows,
        processing_class=tokenizers[0],
        teacher_processing_class=tokenizers[1],
        **(options or {}),
    )


def recorded_run(models: tuple, tokenizers: tuple, folder: Any, rows: Any = None, **overrides: Any) -> Recorder:
    """A run of two steps of two micro-batches of two rows, or as the overrides say."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "loss_chunk_size": 3}
    trainer = make_trainer(models, tokenizers, folder, rows, trainer_class=Recorder, **(settings | overrides))
    trainer.train()
    return trainer


# The same step in float64


def forward_kl(log_q, log_p, args):
    return (log_p.exp() * (log_p - log_q)).sum()


def reverse_kl(log_q, log_p, args):
    return (log_q.exp() * (log_q - log_p)).sum()


def jsd(log_q, log_p, args):
    q, p = log_q.exp(), log_p.exp()
    mean = ((q + p) / 2).log()
    return (p * (log_p - mean)).sum() / 2 + (q * (log_q - mean)).sum() / 2


def skewed_forward_kl(log_q, log_p, args):
    q, p = log_q.exp(), log_p.exp()
    return (p * (log_p - (args.skew * p + (1 - args.skew) * q).log())).sum()


def skewed_reverse_kl(log_q, log_p, args):
    q, p = log_q.exp(), log_p.exp()
    return (q * (log_q - ((1 - args.skew) * p + args.skew * q).log())).sum()


def adaptive_kl(log_q, log_p, args):
    q, p = log_q.detach().exp(), log_p.exp()
    order = p.argsort()
    in_tail = p[order].cumsum(0) <= 1 - args.adaptive_head
    gaps = (p - q).abs()[order]
    head, tail = gaps[~in_tail].sum(), gaps[in_tail].sum()
    return (head * forward_kl(log_q, log_p, args) + tail * reverse_kl(log_q, log_p, args)) / (head + tail)


def total_variation(log_q, log_p, args):
    return (log_q.exp() - log_p.exp()).abs().sum() / 2


DIVERGENCES = {
    function.__name__: function
    for function in (forward_kl, reverse_kl, jsd, skewed_forward_kl, skewed_reverse_kl, adaptive_kl, total_variation)
}


def divergence(name, student_logits, teacher_logits, args, teacher_temperature=1.0):
    """At the temperature of the run; the teacher is held fixed."""
    log_q = (student_logits / args.kd_temperature).log_softmax(-1)
    log_p = (teacher_logits.detach() / args.kd_temperature / teacher_temperature).log_softmax(-1)
    return DIVERGENCES[name](log_q, log_p, args)


def unpadded(batch, prefix=""):
    """Rows of one side of a batch: ids and labels."""
    lengths = batch[f"{prefix}attention_mask"].sum(1).tolist()
    ids, labels = batch[f"{prefix}input_ids"], batch[f"{prefix}labels"]
    return [(ids[i, :length], labels[i, :length].tolist()) for i, length in enumerate(lengths)]


def head_of(model):
    """Weight and bias of the output head, with what the family multiplies logits by."""
    config, head = model.config.to_dict(), model.get_output_embeddings()
    scale = (config.get("logit_scale") or 1.0) / (config.get("logits_scaling") or 1.0)
    return head.weight * scale, None if head.bias is None else head.bias * scale


def logits_at(model, state):
    """Of a state that another model's was projected to; the head is held fixed."""
    weight, bias = head_of(model)
    logits = project((weight.detach(), None if bias is None else bias.detach()), state)
    cap = model.config.to_dict().get("final_logit_softcapping")
    return logits if cap is None else cap * torch.tanh(logits / cap)


def read(model, ids, labels):
    """The trained tokens of one row: last hidden states, logits, what is read and what is predicted."""
    trained = [i for i in range(len(labels) - 1) if labels[i + 1] != -100]
    kept = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    logits = model(ids[None]).logits[0, trained]
    hook.remove()
    return SimpleNamespace(
        hidden=kept[-1][0, trained],
        logits=logits,
        read=ids[trained],
        labels=torch.tensor([labels[i + 1] for i in trained], dtype=torch.long),
        trained=trained,
        row_labels=labels,
    )


def literal_partners(student, teacher, tokenizers, by="token"):
    """
    Pairs of trained tokens that cover the same characters of the same completion, or both end it; by context, that
    begin at the same character.
    """

    def spans(side, tokenizer):
        place, found = 0, []
        for label in side.labels.tolist():
            if label == tokenizer.eos_token_id:
                found.append("end")
                continue
            text = tokenizer.decode([label])
            found.append((place, place + len(text)) if by == "token" else place)
            place += len(text)
        return found

    own, theirs = spans(student, tokenizers[0]), spans(teacher, tokenizers[1])
    return [(i, theirs.index(span)) for i, span in enumerate(own) if span in theirs]


def mixed(values, counts, args):
    """Each source over its own number of tokens, then both together; one that is absent leaves it to the other."""
    means = {source: sum(values[source]) / counts[source] for source in SOURCES if counts[source]}
    if len(means) < 2:
        return sum(means.values(), torch.tensor(0.0, dtype=torch.float64))
    weight = args.on_policy_weight
    return (1 - weight) * means["off_policy"] + weight * means["on_policy"]


class Values(dict):
    """Lists of values by name and source, and what each is divided by."""

    def __missing__(self, name):
        self[name] = {source: [] for source in SOURCES}
        return self[name]

    def mean(self, name, source):
        values = [float(value) for value in self[name][source]]
        return sum(values) / len(values) if values else None

    def counts(self, name):
        return {source: len(values) for source, values in self[name].items()}


def plain_step(trainer, number, models, tokenizers, alignment, version="v2", **options):
    r"""
    A recorded step again: the loss, all values by name, and gradients by name.

    `models` are as they were at the start, and `options` (with those of the `version`) what the run was asked for.
    """
    record, args = trainer.record[number], trainer.args
    how = SimpleNamespace(**(VERSIONS[version] | options))
    if alignment == "cma" and version == "v1":
        how.gate = options.get("gate", True)
    student, teacher = (copy.deepcopy(model).double() for model in models)
    student.load_state_dict(record.student)
    teacher.requires_grad_(False)
    modules = {name: value.double().requires_grad_() for name, value in record.modules.items()}
    values, denominators = Values(), Values()
    how.is_context = alignment == "eta" and args.eta_pairs == "context"
    rows = read_rows(record, student, teacher, tokenizers, alignment, "context" if how.is_context else "token")
    if args.objective == "dual_space":
        check_modules(modules, args, how)
        to_student, to_teacher = projector(modules, "teacher_to_student"), projector(modules, "student_to_teacher")
        if how.recomputed and args.teacher_space:
            pair = map_that_keeps_logits(student, teacher, *shared_tokens(args, tokenizers))
            to_teacher = partial(project, pair)
        if alignment == "cma":
            attended(rows, record, args, student, teacher, modules, to_student, to_teacher)
        else:
            projected(rows, to_student, to_teacher)
    for row in rows:
        add_row(row, values, denominators, args, how, student, teacher, tokenizers, alignment)
    loss = (1 - args.kd_rate) * mixed_reference(values["student_ce"], student)
    for name in ("projector_ce", "taught", "teacher_space_kd", "distance"):
        if name in values:
            counted = denominators.counts(name) if name in denominators else values.counts(name)
            loss = loss + args.kd_rate * mixed(values[name], counted, args)
    loss.backward()
    gradients = {name: value.grad for name, value in student.named_parameters() if value.grad is not None}
    gradients |= {f"aux.{name}": value.grad for name, value in modules.items() if value.grad is not None}
    return loss.item(), values, gradients


def check_modules(modules, args, how):
    """A run has the projectors that it was asked for."""
    linear = ".linear" if args.projector_hidden_size else ""
    assert (f"teacher_to_student{linear}.weight" in modules) == args.student_space
    assert (f"teacher_to_student{linear}.bias" in modules) == (how.bias and args.student_space)
    assert (f"student_to_teacher{linear}.weight" in modules) == (not how.recomputed and args.teacher_space)
    if args.projector_hidden_size:
        assert len(modules["teacher_to_student.inner.weight"]) == args.projector_hidden_size


def mixed_reference(values, student):
    """The text alone, not what the student has written."""
    found = values["off_policy"]
    return sum(found) / len(found) if found else 0.0 * student.get_output_embeddings().weight.sum()


def read_rows(record, student, teacher, tokenizers, alignment, by):
    rows = []
    for number, batch in enumerate(record.batches):
        prefix = "" if alignment == "same" else "teacher_"
        sides = zip(unpadded(batch), unpadded(batch, prefix), batch["is_on_policy"].tolist(), strict=True)
        for own, theirs, on_policy in sides:
            s, t = read(student, *own), read(teacher, *theirs)
            pairs = (
                literal_partners(s, t, tokenizers, by)
                if alignment != "same"
                else [(i, i) for i in range(len(s.labels))]
            )
            rows.append(SimpleNamespace(s=s, t=t, source=SOURCES[on_policy], pairs=pairs, batch=number))
    return rows


def projector(modules, name):
    """What a projector does to a state, `None` for one that a run has not."""
    if f"{name}.linear.weight" in modules:
        inner, outer = (modules.get(f"{name}.{part}.weight") for part in ("inner", "outer"))
        offset, linear = modules[f"{name}.inner.bias"], projector(modules, f"{name}.linear")

        def bent(state):
            normed = state / (state.square().mean() + torch.finfo(torch.float32).eps).sqrt()
            x = inner @ normed + offset
            return linear(state) + outer @ (x * (1 + torch.erf(x / 2**0.5)) / 2)

        return bent
    if f"{name}.weight" not in modules:
        return None
    pair = modules[f"{name}.weight"], modules.get(f"{name}.bias")
    return partial(project, pair)


def map_that_keeps_logits(source, target, source_ids, target_ids):
    """By a pseudo-inverse over the tokens that both have; the biases' difference is taken over as nearly."""
    (weight, bias), (other_weight, other_bias) = (
        [None if part is None else part.detach().double()[ids] for part in head_of(model)]
        for model, ids in ((source, source_ids), (target, target_ids))
    )
    inverse = torch.linalg.pinv(other_weight)
    if bias is None and other_bias is None:
        return inverse @ weight, None
    return inverse @ weight, inverse @ ((0.0 if bias is None else bias) - (0.0 if other_bias is None else other_bias))


def shared_tokens(args, tokenizers):
    """Ids of the student and of the teacher, those of the lowest of the student first."""
    found = sorted((own, other) for other, own in same_tokens(tokenizers[0], tokenizers[1] or tokenizers[0]).items())
    return (list(ids) for ids in zip(*found[: args.init_vocab_size], strict=True))


def projected(rows, to_student, to_teacher):
    """Token by token: of each pair the teacher's state in the student's space, and the other way round."""
    for row in rows:
        row.at_student = {i: to_student(row.t.hidden[j]) for i, j in row.pairs} if to_student else {}
        row.at_teacher = {j: to_teacher(row.s.hidden[i]) for i, j in row.pairs} if to_teacher else {}


def attended(rows, record, args, student, teacher, modules, to_student, to_teacher):
    """Every token of a row attends to all of the other side's."""
    own, theirs = (model.get_input_embeddings().weight.detach() for model in (student, teacher))
    for row in rows:
        row.queries = torch.cat([own[row.s.read], own[row.s.labels]], dim=1)
        row.keys = torch.cat([theirs[row.t.read], theirs[row.t.labels]], dim=1)
        predicted = row.t.logits.argmax(-1) if args.projector_label == "teacher_top1" else row.t.labels
        row.predicted = theirs[predicted]
    for number, batch in enumerate(record.batches):
        in_batch = [row for row in rows if row.batch == number]
        scales = padded_scales(batch, in_batch, teacher) if args.cma_norm_scope == "padded" else valid_scales(rows)
        for row in in_batch:
            states = row.t.hidden / scales[1] + row.predicted / scales[2]
            teacher_values = states[:, :0] if to_student is None else torch.stack([to_student(h) for h in states])
            student_values = row.s.hidden[:, :0]
            if to_teacher is not None:
                student_values = torch.stack([to_teacher(h) for h in row.s.hidden])
            query = modules["attention.query.weight"], modules.get("attention.query.bias")
            keys = row.keys / scales[0]
            at_student, at_teacher = cross_model_attention(query, row.queries, keys, teacher_values, student_values)
            row.at_student = dict(enumerate(at_student)) if to_student else {}
            row.at_teacher = dict(enumerate(at_teacher)) if to_teacher else {}


def valid_scales(rows):
    """Of the trained tokens of the whole step."""
    return [
        standard_deviation(torch.cat([part(row).flatten() for row in rows]))
        for part in (lambda row: row.keys, lambda row: row.t.hidden, lambda row: row.predicted)
    ]


def padded_scales(batch, rows, teacher):
    """As the authors take them: of every position of the padded batch but the last, token 0 where none is trained."""
    embeddings = teacher.get_input_embeddings().weight
    ids, labels = batch["teacher_input_ids"][:, :-1].clone(), batch["teacher_labels"][:, 1:].clone()
    ids[labels == -100], out = 0, embeddings[labels.clamp_min(0)]
    out[labels == -100] = embeddings[0]
    out[labels != -100] = torch.cat([row.predicted for row in rows])
    mask = batch["teacher_attention_mask"]
    hidden = teacher.model(batch["teacher_input_ids"], attention_mask=mask).last_hidden_state[:, :-1]
    keys = torch.cat([embeddings[ids], embeddings[labels.clamp_min(0)]], dim=-1)
    keys[labels == -100] = torch.cat([embeddings[0], embeddings[0]])
    return [standard_deviation(part) for part in (keys, hidden, out)]


def add_row(row, values, denominators, args, how, student, teacher, tokenizers, alignment):
    """All values of one row."""
    source, to_student = row.source, same_tokens(tokenizers[0], tokenizers[1] or tokenizers[0])
    for logits, label in zip(row.s.logits, row.s.labels, strict=True):
        values["student_ce"][source].append(-logits.log_softmax(-1)[label])
    if args.objective != "dual_space":
        return add_distances(row, values, args, to_student)
    partner = dict(row.pairs)
    for i, state in row.at_student.items():
        label = row.s.labels[i].item()
        if how.label == "teacher_top1" or source == "on_policy":
            label = to_student.get(row.t.logits[partner[i]].argmax().item(), -1) if i in partner else -1
            label = -1 if how.is_context else label  # the next tokens need not be the same
        logits = logits_at(student, state)
        value = divergence(args.divergence, row.s.logits[i], logits, args, args.teacher_temperature)
        values["student_space_kd"][source].append(value)
        agrees = label >= 0 and logits.argmax().item() == label
        if label >= 0:
            values["projector_ce"][source].append(-logits.log_softmax(-1)[label])
            values["projector_agreement"][source].append(agrees)
            values["student_agreement"][source].append(row.s.logits[i].argmax().item() == label)
        is_open = agrees or (how.is_context and label < 0) if how.gate else True
        values["gate"][source].append(is_open)
        if is_open:
            values["taught"][source].append(value)
        if is_open or not how.gated_mean:
            denominators["taught"][source].append(1)
    name = vars(how).get("teacher_space_divergence", args.divergence)
    for j, state in row.at_teacher.items():
        value = divergence(name, logits_at(teacher, state), row.t.logits[j], args)
        values["teacher_space_kd"][source].append(value)
    if alignment == "cma" and args.teacher_space:
        counted = row.t if args.teacher_space_denominator == "teacher" else row.s
        denominators["teacher_space_kd"][source] += [1] * len(counted.labels)
    values["aligned"][source] += [1.0] * len(row.pairs) + [0.0] * (len(row.s.labels) - len(row.pairs))


def add_distances(row, values, args, to_student):
    """The baselines: divergence over the shared vocabulary at aligned tokens, or sorted probabilities in turn."""
    if args.objective == "uld":
        for own, theirs in zip(row.s.logits, row.t.logits, strict=False):
            values["distance"][row.source].append(sorted_distance(own, theirs))
        return
    theirs, own = (list(ids) for ids in zip(*to_student.items(), strict=True))
    for i, j in row.pairs:
        value = divergence(args.divergence, row.s.logits[i][own], row.t.logits[j][theirs], args)
        values["distance"][row.source].append(value)


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-6)).item()


def assert_agrees(trainer, models, tokenizers, alignment, version, steps=(0, 1), **options):
    """Loss, logged values and gradients of some steps; all values of the last, by name."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == len(trainer.record)
    for number in steps:
        loss, values, gradients = plain_step(trainer, number, models, tokenizers, alignment, version, **options)
        entry, found = entries[number], trainer.record[number].gradients
        assert entry["loss"] == pytest.approx(loss, rel=1e-5)
        for name in values.keys() - {"taught", "aligned"}:
            for source in SOURCES:
                expected = values.mean(name, source)
                assert (f"kd/{source}/{name}" in entry) == (expected is not None), (name, source)
                if expected is not None:
                    assert entry[f"kd/{source}/{name}"] == pytest.approx(expected, rel=1e-5, abs=1e-7), (name, source)
        largest = max(gradient.norm().item() for gradient in gradients.values())
        for name in found.keys() | gradients.keys():
            if name not in gradients or gradients[name].norm() < 1e-6 * largest:
                assert name not in found or found[name].norm() < 1e-5 * largest, name
            else:
                # float32 sums of terms that cancel in part
                assert relative_error(found[name], gradients[name]) < 1e-5, name
    return values
