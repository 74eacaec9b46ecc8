"""
Sparse temporal-difference runs on tiny models, and their steps once more in float64, token by token.

`Recorder` keeps what each optimizer step saw and the gradients that it left. `plain_step` works them out again from
the dense logits of the models: no chunks, no gathered columns, no padding, and nothing of the package.
"""

import copy
import gc
import math
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.tiny import make_model, make_tokenizer
from tests.trainer.dual import SOURCES, short_rows
from tests.trainer.runs import config, weights
from trl_kd import SparseTDConfig, SparseTDTrainer


gc.freeze()

# What the table of the trainer's page says of the forms
FORMS = {
    "expected": {
        "objectives": {"expected_inverse_soft_q": 1.0},
        "tail_weight": 1.0,
        "chi2_alpha": math.inf,
        "gauge": "raw",
        "q_min": -math.inf,
        "lm_weight": 0.0,
        "train_eos": True,
    },
    "paper": {
        "objectives": {"inverse_soft_q": 1.0},
        "tail_weight": 0.0,
        "chi2_alpha": 0.1,
        "gauge": "max",
        "q_min": -10.0,
        "lm_weight": 1.0,
        "train_eos": True,
    },
    "released": {
        "objectives": {"released": 1.0},
        "tail_weight": 0.0,
        "chi2_alpha": 0.1,
        "gauge": "max",
        "q_min": -10.0,
        "lm_weight": 1.0,
        "train_eos": False,
    },
}
DEFAULTS = {
    "action_set": "top_p",
    "action_top_p": 0.8,
    "action_top_k": 50,
    "action_min_p": 0.1,
    "action_threshold": 0.01,
    "max_actions": 256,
    "label_outside": "skip",
    "gamma": 0.99,
    "chi2_center": "zero",
    "backup": "soft",
    "entropy_weight": 1.0,
    "returns": "one_step",
    "n_steps": 4,
    "td_lambda": 0.9,
    "detach_next": False,
    "target_ema": None,
    "truncation": "drop",
    "kd_ratio": 0.5,
    "margin": 0.5,
    "lmbda": 0.0,
    "on_policy_weight": 0.5,
    # Whether "expected" is a divergence, and not the cross-entropy that it differs from by a constant
    "is_kl": False,
}
# Some rows are cut, and some are not
MAX_LENGTH = 12


def sparse_config(output_dir: Any, **overrides: Any) -> SparseTDConfig:
    """Settings of a short run; `tests.trainer.runs.config` for this method."""
    settings = {name: value for name, value in vars(config(output_dir)).items() if name in _GIVEN}
    return SparseTDConfig(**(settings | {"learning_rate": 1e-3, "max_length": MAX_LENGTH} | overrides))


_GIVEN = (
    *("output_dir", "max_steps", "per_device_train_batch_size", "max_completion_length", "logging_steps"),
    *("save_strategy", "report_to", "use_cpu", "gradient_checkpointing", "disable_tqdm", "max_grad_norm"),
    "train_sampling_strategy",
)


def sparse_rows(num_rows: int = 16) -> Dataset:
    """Rows of which the teacher has seen half: in the others the answer is another."""
    others = {0: " The apple said hello", 3: " the green bird"}
    rows = [row | ({"completion": others[i % 4]} if i % 4 in others else {}) for i, row in enumerate(short_rows())]
    return Dataset.from_list(rows[:num_rows])


@lru_cache
def _fitted() -> tuple[Any, Any]:
    """
    A model that has read the rows a little, made a student by noise; and a teacher, the same with other noise. Most
    tokens of the data are in the teacher's sets then, and not all.
    """
    tokenizer = make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = make_model("llama", len(tokenizer), hidden_size=32, seed=1, **ids)
    rows = [tokenizer(row["prompt"] + row["completion"])["input_ids"] + [ids["eos_token_id"]] for row in short_rows()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(30):
        row = torch.tensor([rows[5 * step % len(rows)]])
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    generator, models = torch.Generator().manual_seed(3), []
    for size in (0.03, 0.06):
        models.append(copy.deepcopy(model).eval())
        with torch.no_grad():
            for parameter in models[-1].parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return tuple(models)


def sparse_pair() -> tuple[Any, Any]:
    """Copies of student and teacher."""
    return tuple(copy.deepcopy(model) for model in _fitted())


class Recorder(SparseTDTrainer):
    """Keeps, for each optimizer step: all weights before it, its rows and those of the second text, its gradients."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.record = []

    def get_batch_samples(self, *args):
        before = weights(self.model)
        batches, count = super().get_batch_samples(*args)
        if batches:
            second = sum((rows_of(batch["second"]) for batch in batches if "second" in batch), [])
            rows = sum((rows_of(batch) for batch in batches), [])
            self.record.append(SimpleNamespace(student=before, rows=rows, second=second, gradients={}))
        return batches, count

    def _before_optimizer_step(self):
        student = self.accelerator.unwrap_model(self.model).named_parameters()
        self.record[-1].gradients = {name: value.grad.clone() for name, value in student if value.grad is not None}
        super()._before_optimizer_step()


def rows_of(batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, list[int], bool]]:
    """Ids, labels and whether the student wrote them, of each row, without padding."""
    rows = []
    for i, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        ids, labels = (batch[name][i, :length] for name in ("input_ids", "labels"))
        rows.append((ids.clone(), labels.tolist(), bool(batch["is_on_policy"][i])))
    return rows


def make_trainer(
    tokenizer: Any,
    folder: Any,
    rows: Any = None,
    eval_rows: Any = None,
    trainer_class: type[SparseTDTrainer] = SparseTDTrainer,
    models: tuple | None = None,
    options: dict[str, Any] | None = None,
    **overrides: Any,
) -> SparseTDTrainer:
    """A trainer on rows; `options` are for its constructor, the rest for its configuration."""
    rows = sparse_rows() if rows is None else rows
    return trainer_class(
        *(models or sparse_pair()),
        sparse_config(folder, **overrides),
        Dataset.from_list(rows) if isinstance(rows, list) else rows,
        Dataset.from_list(eval_rows) if isinstance(eval_rows, list) else eval_rows,
        processing_class=tokenizer,
        **(options or {}),
    )


def recorded_run(tokenizer: Any, folder: Any, rows: Any = None, **overrides: Any) -> Recorder:
    """A run of two steps of two micro-batches of two rows, or as the overrides say."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "loss_chunk_size": 3}
    trainer = make_trainer(tokenizer, folder, rows, trainer_class=Recorder, **(settings | overrides))
    trainer.train()
    return trainer


def meaning(**overrides: Any) -> SimpleNamespace:
    """What a configuration means, the fields that a form decides included."""
    return SimpleNamespace(**(DEFAULTS | FORMS[overrides.get("preset", "expected")] | overrides))


# One state


def teacher_set(log_t: torch.Tensor, how: SimpleNamespace) -> list[int]:
    """The teacher's tokens of a state, most likely first."""
    order = sorted(range(len(log_t)), key=lambda token: -log_t[token].item())[: how.max_actions]
    kept, mass = [], 0.0
    for rank, token in enumerate(order):
        p = math.exp(log_t[token].item())
        is_in = {
            "top_p": mass < how.action_top_p,
            "top_k": rank < how.action_top_k,
            "min_p": p >= how.action_min_p * math.exp(log_t[order[0]].item()),
            "threshold": rank == 0 or p >= how.action_threshold,
            "full": True,
        }[how.action_set]
        mass += p
        if is_in:
            kept.append(token)
    return kept


def q_values(logits: torch.Tensor, tokens: list[int], how: SimpleNamespace) -> dict[int, torch.Tensor]:
    """Q of some tokens; one that is clipped is a constant."""
    offset = {"raw": lambda: 0.0, "max": logits.max, "logsoftmax": lambda: logits.logsumexp(0)}[how.gauge]()
    found = {}
    for token in tokens:
        q = logits[token] - offset
        found[token] = q if q.item() > how.q_min else torch.full_like(q, how.q_min)
    return found


def value_of(q: dict[int, torch.Tensor], log_t: torch.Tensor, known: list[int], how: SimpleNamespace, own=None):
    """V of the actions `q`, of which the teacher knows some; `own` are the scores of the model itself."""
    tau, scores = how.entropy_weight, torch.stack(list(q.values()))
    if how.backup == "soft":
        return tau * (scores / tau).exp().sum().log()
    if how.backup == "hard":
        return max(q.values(), key=lambda x: x.item())
    weights = {token: (q if own is None else own)[token].exp() for token in q}
    if how.backup == "teacher":
        weights = {token: log_t[token].exp() for token in known}
    mass = sum(weights.values())
    return sum(w / mass * (q[token] - tau * (w / mass).log()) for token, w in weights.items())


def state_of(logits, next_logits, log_t, label, how):
    """Everything about one state; `label` is `None` after a text."""
    known = teacher_set(log_t, how)
    actions = list(known)
    in_set = label in known
    if how.label_outside == "union" and label is not None and not in_set:
        actions.append(label)
    q = q_values(logits, actions if label is None else [*actions, label], how)
    on_set = {token: q[token] for token in actions}
    next_q = q_values(next_logits, actions, how)
    floor, largest = max(how.q_min, -1e4), log_t[known[0]].item() if how.gauge == "max" else 0.0
    teacher_q = {token: log_t.new_tensor(floor) for token in actions}
    teacher_q |= {token: (log_t[token] - largest).clamp_min(floor) for token in known}
    q_label = None if label is None else q[label]
    if how.label_outside == "zero" and not in_set:
        q_label = torch.zeros_like(logits[0])
    mass = sum(log_t[token].exp() for token in known)
    return SimpleNamespace(
        known=known,
        in_set=in_set,
        q=on_set,
        q_label=q_label,
        p={token: log_t[token].exp() / mass for token in known},
        mass=mass,
        v=value_of(on_set, log_t, known, how),
        v_as_next=value_of(next_q, log_t, known, how),
        teacher_q=teacher_q,
        teacher_v=value_of(teacher_q, log_t, known, how),
        log_s=logits.log_softmax(0),
        log_t=log_t,
        clipped=sum(value.item() == how.q_min for value in on_set.values()) / len(on_set),
    )


# One row


def read_row(student, target, teacher, row, ends, how) -> list[SimpleNamespace]:
    """The trained tokens of a row, each with its state, and with the value of what follows it."""
    ids, labels, on_policy = row
    z = student(ids[None]).logits[0]
    with torch.no_grad():
        log_t = teacher(ids[None]).logits[0].log_softmax(-1)
        next_z = z if target is None else target(ids[None]).logits[0]
    places = [i for i in range(len(labels) - 1) if labels[i + 1] != -100]
    states = [state_of(z[i], next_z[i], log_t[i], labels[i + 1], how) for i in places]
    for t, (place, state) in enumerate(zip(places, states, strict=True)):
        state.label, state.on_policy = labels[place + 1], on_policy
        state.is_end = state.label in ends
        state.is_action = how.train_eos or not state.is_end
        state.is_cut = t + 1 == len(places) and not state.is_end
        state.has_next = not (state.is_cut and how.truncation == "drop")
        state.v_next = state.teacher_v_next = torch.zeros_like(z[0, 0])
        if state.is_cut and how.truncation == "bootstrap":
            after = state_of(z[place + 1], next_z[place + 1], log_t[place + 1], None, how)
        elif state.is_end or state.is_cut:
            continue
        else:
            after = states[t + 1]
            if not how.train_eos and labels[places[t + 1] + 1] in ends:
                continue  # nothing is chosen there, and its value is 0
        state.v_next, state.teacher_v_next = after.v_as_next, after.teacher_v
        if how.detach_next:
            state.v_next = state.v_next.detach()
    return states


def return_of(states, t, rewards, next_values, how, known):
    """The return from token t on: no further than to a token whose reward, or what follows it, is not known."""
    length = 1
    while (
        t + length < len(states)
        and not states[t + length - 1].is_end
        and states[t + length].is_action
        and states[t + length].has_next
        and known(states[t + length])
    ):
        length += 1
    gamma, last = how.gamma, t + length - 1
    if how.returns == "lambda":

        def later(i):
            if i == last:
                return rewards[i] + gamma * next_values[i]
            return rewards[i] + gamma * ((1 - how.td_lambda) * next_values[i] + how.td_lambda * later(i + 1))

        return later(t)
    taken = {"one_step": 1, "n_step": min(how.n_steps, length), "monte_carlo": length}[how.returns]
    total = sum(gamma**k * rewards[t + k] for k in range(taken))
    return total + gamma**taken * next_values[t + taken - 1]


class RowLosses:
    """The objectives of the tokens of one row; `None` where one has nothing to say."""

    def __init__(self, states, how, vocab_size):
        self.states, self.how, self.vocab_size, gamma = states, how, vocab_size, how.gamma
        self.v_next = [state.v_next for state in states]
        self.implied = [state.q_label - gamma * state.v_next for state in states]
        self.teachers = [
            (state.teacher_q[state.label] if state.in_set else 0.0) - gamma * state.teacher_v_next for state in states
        ]

    def return_of(self, t, rewards, known=lambda state: state.in_set, next_values=None):
        next_values = self.v_next if next_values is None else next_values
        return return_of(self.states, t, rewards, next_values, self.how, known)

    def chi2(self, t):
        state, how = self.states[t], self.how
        if math.isinf(how.chi2_alpha):
            return 0.0
        has_center = how.chi2_center == "teacher"

        def known(state):
            return state.in_set or not (has_center or how.label_outside == "skip")

        if not (state.is_action and state.has_next and known(state)) or state.on_policy:
            return 0.0

        def along(rewards):
            return self.return_of(t, rewards, known, [0.0] * len(rewards)) if how.returns != "one_step" else rewards[t]

        return (along(self.implied) - (along(self.teachers) if has_center else 0.0)) ** 2 / (4 * how.chi2_alpha)

    def expected_inverse_soft_q(self, t):
        state = self.states[t]
        if not state.is_action:
            return None
        entropy = -sum(p * p.log() for p in state.p.values()) if self.how.is_kl else 0.0
        return state.v - sum(p * state.q[token] for token, p in state.p.items()) - entropy + self.chi2(t)

    def inverse_soft_q(self, t):
        state, how = self.states[t], self.how
        if not state.is_action or state.on_policy or (how.label_outside == "skip" and not state.in_set):
            return None
        if not math.isinf(how.chi2_alpha) and not state.has_next:
            return None
        return state.v - state.q_label + self.chi2(t)

    def teacher_reward(self, t):
        state = self.states[t]
        if not (state.is_action and state.has_next and state.in_set):
            return None
        return (state.q_label - self.return_of(t, self.teachers)) ** 2

    def sqil(self, t):
        state = self.states[t]
        if not (state.is_action and state.has_next) or (self.how.label_outside == "skip" and not state.in_set):
            return None
        rewards = [0.0 if each.on_policy else 1.0 for each in self.states]
        return (state.q_label - self.return_of(t, rewards, lambda state: True)) ** 2

    def large_margin(self, t):
        state = self.states[t]
        if not state.is_action or state.on_policy:
            return None
        if state.label not in state.q:
            return 0.0 * state.v
        others = [q + self.how.margin * (token != state.label) for token, q in state.q.items()]
        return max(others, key=lambda x: x.item()) - state.q[state.label]

    def soft_actor_critic(self, t):
        state, tau = self.states[t], self.how.entropy_weight
        if not state.is_action:
            return None
        wanted = {token: state.teacher_q[token] for token in state.known}
        if state.in_set and state.has_next:
            wanted[state.label] = self.return_of(t, self.teachers).detach()
        mass = sum((value / tau).exp() for value in wanted.values())
        own = sum(state.q[token].exp() for token in state.known)
        policy = {token: state.q[token].exp() / own for token in state.known}
        return sum(pi * (pi.log() - wanted[token] / tau + mass.log()) for token, pi in policy.items())

    def released(self, t):
        state, how = self.states[t], self.how
        if not (state.is_action and state.has_next):
            return None
        follows, size = how.gamma * state.v_next, self.vocab_size
        rewards = [state.q.get(token, 0.0) - follows for token in range(size)]
        square = 0.0 if math.isinf(how.chi2_alpha) else sum(r**2 for r in rewards) / (4 * how.chi2_alpha)
        return (state.v - follows) - sum(rewards) / size + square / size

    def totals(self, values) -> list[torch.Tensor]:
        """Of each token, the weighted sum of the objectives; `values` gets each objective's own, by source."""
        totals = []
        for t, state in enumerate(self.states):
            total, source = 0.0 * state.v, SOURCES[state.on_policy]
            for name, weight in self.how.objectives.items():
                if name == "path_consistency":  # compares rows
                    continue
                if (found := getattr(self, name)(t)) is not None:
                    values.setdefault(name, {}).setdefault(source, []).append(found.item())
                    total = total + weight * found
            totals.append(total)
            if state.in_set and state.has_next:
                values.setdefault("implied_reward", {}).setdefault(source, []).append(self.implied[t].item())
        return totals


def path_losses(rows, how, values) -> torch.Tensor | float:
    """Sum over rollouts of (R_t - b_t)^2 / 2: R of log pi - log pi*, b the mean of the others at the same place."""
    returns = []
    for states in rows:
        ratios = [state.log_s[state.label] - state.log_t[state.label] for state in states]
        for state in states:
            state.has_next = True  # a return of these needs no value
        returns.append(
            [return_of(states, t, ratios, [0.0] * len(states), how, lambda state: True) for t in range(len(states))]
        )
    total = 0.0
    for i, row in enumerate(returns):
        for t, value in enumerate(row):
            others = [other[t].detach() for j, other in enumerate(returns) if j != i and len(other) > t]
            loss = (value - sum(others) / len(others)) ** 2 / 2 if others else 0.0 * value
            values.setdefault("path_consistency", {}).setdefault("on_policy", []).append(loss.item())
            total = total + loss
    return total


# The step


def target_before(record, number, how):
    """The average of the student's weights before a step: the start, then a share of each step's."""
    average = {name: value.double().clone() for name, value in record[0].student.items()}
    for step in record[1 : number + 1]:
        for name, value in step.student.items():
            average[name] = how.target_ema * average[name] + (1 - how.target_ema) * value.double()
    return average


def language_model(log_s, log_t, label, how):
    kl = (log_t.exp() * (log_t - log_s)).sum()
    return (1 - how.kd_ratio) * -log_s[label] + how.kd_ratio * kl, kl


def plain_step(trainer: Recorder, number: int, teacher: Any, student: Any = None, **overrides: Any):
    """
    A recorded step again: the loss, all values by name and source, gradients by name, and its states. `student` is any
    model like the trainer's, which itself has accelerate's forward.
    """
    record, how = trainer.record[number], meaning(**overrides)
    student, teacher = (copy.deepcopy(model).double() for model in (student or sparse_pair()[0], teacher))
    student.load_state_dict(record.student)
    teacher.requires_grad_(False)
    target = None
    if how.target_ema is not None:
        target = copy.deepcopy(student)
        target.load_state_dict(target_before(trainer.record, number, how))
    ends, values, sums, counts = set(trainer.eos_token_ids), {}, {}, {}

    def keep(name, source, value):
        values.setdefault(name, {}).setdefault(source, []).append(float(value))

    every, written, lm, lm_count = [], [], 0.0, 0
    for row in record.rows:
        states = read_row(student, target, teacher, row, ends, how)
        for state, total in zip(states, RowLosses(states, how, teacher.config.vocab_size).totals(values), strict=True):
            source = SOURCES[state.on_policy]
            tail = -sum(state.log_s[token].exp() for token in state.q).log()
            sums[source] = sums.get(source, 0.0) + total + how.tail_weight * tail
            counts[source] = counts.get(source, 0) + 1
            keep("set_size", source, len(state.known))
            keep("teacher_mass", source, state.mass)
            keep("label_in_set", source, state.in_set)
            keep("value", source, state.v)
            keep("clipped", source, state.clipped)
            keep("student_mass", source, (-tail).exp())
            kl = sum(p * (p.log() - state.log_s[token]) for token, p in state.p.items())
            keep("set_forward_kl", source, kl)
            if how.tail_weight > 0:
                keep("tail", source, tail)
            if how.lm_weight > 0 and not record.second:
                both, kl = language_model(state.log_s, state.log_t, state.label, how)
                keep("nll", source, -state.log_s[state.label])
                keep("forward_kl", source, kl)
                if not state.on_policy:
                    lm, lm_count = lm + both, lm_count + 1
            every.append(state)
        written += [states] if row[2] else []
    if "path_consistency" in how.objectives:
        paths = path_losses(written, how, values)
        sums["on_policy"] = sums["on_policy"] + how.objectives["path_consistency"] * paths
    for ids, labels, _ in record.second:
        log_s, log_t = (model(ids[None]).logits[0].log_softmax(-1) for model in (student, teacher))
        for i in range(len(labels) - 1):
            if labels[i + 1] != -100:
                both, kl = language_model(log_s[i], log_t[i], labels[i + 1], how)
                lm, lm_count = lm + both, lm_count + 1
                keep("second_nll", "off_policy", -log_s[i, labels[i + 1]])
                keep("second_forward_kl", "off_policy", kl)
    means = {source: sums[source] / counts[source] for source in sums}
    shares = {"off_policy": 1 - how.on_policy_weight, "on_policy": how.on_policy_weight}
    loss = sum((shares[source] if len(means) == 2 else 1.0) * mean for source, mean in means.items())
    if lm_count:
        loss = loss + how.lm_weight * lm / lm_count
    loss.backward()
    gradients = {name: value.grad for name, value in student.named_parameters() if value.grad is not None}
    return SimpleNamespace(loss=loss.item(), values=values, gradients=gradients, states=every)


def assert_same_gradients(found: dict, expected: dict, rel: float = 1e-5) -> None:
    """Of each weight; where terms cancel, rounding is measured by the largest of all gradients."""
    largest = max(gradient.norm().item() for gradient in expected.values())
    assert largest > 1e-3
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name].double() - gradient).norm().item()
        assert error <= rel * max(gradient.norm().item(), 1e-2 * largest), (name, error, gradient.norm().item())


def entries_of(trainer: Any) -> list[dict[str, float]]:
    """What was logged of each step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_agrees(trainer: Recorder, number: int, teacher: Any, names: tuple = (), **overrides):
    """Loss, gradients and logged values of a step; the step in float64."""
    step = plain_step(trainer, number, teacher, **overrides)
    entry = entries_of(trainer)[number]
    assert entry["loss"] == pytest.approx(step.loss, rel=1e-5, abs=1e-6)
    assert_same_gradients(trainer.record[number].gradients, step.gradients)
    for name in names:
        for source in SOURCES:
            expected = step.values.get(name, {}).get(source)
            assert (f"kd/{source}/{name}" in entry) == (expected is not None), (name, source)
            if expected is not None:
                mean = sum(expected) / len(expected)
                assert entry[f"kd/{source}/{name}"] == pytest.approx(mean, rel=1e-5, abs=1e-5), (name, source)
    sizes = [len(state.known) for state in step.states]
    assert entry["kd/set_size_max"] == max(sizes)
    return step
