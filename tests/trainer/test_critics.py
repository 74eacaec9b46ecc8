"""Learned critics in training: against the same game in plain float64, and however a step is split."""

import logging
import os
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.trainer import plain
from tests.trainer.plain import SOURCES, Recorder
from tests.trainer.runs import ProjectingTrainer, config, logged, pair, same, tiny_dataset, weights
from trl_kd import AMMConfig
from trl_kd.losses import LinearLoss
from trl_kd.modules import LMHead, ValueHead
from trl_kd.trainer import critics, kd_trainer
from trl_kd.trainer.critics import MomentCritics
from trl_kd.trainer.tokens import TokenBatch


SPLITS = [(4, 1), (2, 2), (1, 4)]
# Each head, each choice of features, both orders, each number that enters the game
GAMES = {
    "tied": {"on_policy_weight": 0.25},
    "full": {
        "critic_head": "full",
        "critic_features": "both",
        "gamma": 0.9,
        "critic_bound": 0.7,
        "critic_penalty": 0.4,
        "critic_steps": 3,
        "loss_chunk_size": 5,
    },
    "low_rank": {
        "critic_head": "low_rank",
        "critic_rank": 4,
        "critic_features": "student",
        "critic_order": "after",
        "sft_loss_weight": 0.3,
        "kl_loss_weight": 0.2,
    },
    "tied_after": {
        "critic_order": "after",
        "critic_features": "both",
        "critic_betas": [0.5, 0.8],
        "critic_learning_rate": 0.03,
        "gamma": 0.9,
    },
}


def build(tokenizer, folder, trainer_class=Recorder, models=None, eval_dataset=None, **overrides):
    student, teacher = models or pair(tokenizer)
    args = config(folder, **({"critic": "value_head", "temperature": 0.0} | overrides))
    return trainer_class(student, teacher, args, tiny_dataset(), eval_dataset, tokenizer)


def train(tokenizer, folder, split=(4, 1), **overrides):
    sizes = {"per_device_train_batch_size": split[0], "gradient_accumulation_steps": split[1]}
    trainer = build(tokenizer, folder, **(sizes | overrides))
    trainer.train()
    return trainer


@pytest.fixture(scope="module", params=GAMES)
def games(request, tokenizer, tmp_path_factory):
    """One game, played under each split."""
    folder = tmp_path_factory.mktemp(request.param)
    # A small rate: Adam's first step is a sign, and the sign of a gradient near zero is that of its rounding
    options = {"learning_rate": 1e-3} | GAMES[request.param]
    return [train(tokenizer, folder / str(split[0]), split, **options) for split in SPLITS]


def steps_of(trainer, tokenizer):
    """For each optimizer step: the student, its tokens by source, the critics it met, and the log."""
    for step, log in enumerate(trainer.state.log_history[:2]):
        after = trainer.critics_after(step)
        met = after if trainer.args.critic_order == "before" else trainer.record[step].critics
        yield *plain.read(trainer, tokenizer, step), met, log


# However a step is split


def test_critics_any_split_logs_the_same_numbers(games):
    whole, *others = games
    names = [name for name in whole.state.log_history[0] if name.startswith("kd/")] + ["loss", "grad_norm"]
    assert all(min(logged(whole, f"kd/{source}/tokens")) >= 6 for source in SOURCES)
    for other in others:
        for name in names:
            expected = logged(whole, name)
            assert len(expected) == 2 and logged(other, name) == pytest.approx(expected, rel=1e-5, abs=1e-7), name


def test_critics_any_split_are_the_same_after_the_run(games):
    whole, *others = [weights(trainer.auxiliary.modules) for trainer in games]
    # Adam divides by the size of the gradient: of tokens that neither model takes, 1e-8 or so, the rounding shows
    for other in others:
        for name, expected in whole.items():
            torch.testing.assert_close(other[name], expected, rtol=1e-3, atol=5e-3)
            assert (other[name] - expected).abs().mean() < 1e-4 * expected.abs().mean()


# The same game in plain float64


def test_critics_steps_equal_adam_on_plain_logits(games, tokenizer):
    trainer = games[1]
    args, embeddings = trainer.args, plain.embeddings_of(tokenizer)
    start = {name: value for name, value in trainer.record[0].critics.items() if not name.endswith("whitening")}
    assert not any(value.any() for name, value in start.items() if name.endswith("weight"))
    parameters = {name: value.double().requires_grad_() for name, value in start.items()}
    scale = trainer.auxiliary.modules["off_policy"].scale
    settings = {"lr": args.critic_learning_rate, "betas": args.critic_betas, "eps": 1e-8 * scale}
    adam = torch.optim.Adam(parameters.values(), **settings)
    for step, (_, tokens, _, log) in enumerate(steps_of(trainer, tokenizer)):
        for index in range(args.critic_steps):
            adam.zero_grad()
            values = {s: plain.critic_values(parameters, s, tokens[s].features, embeddings, args) for s in SOURCES}
            objectives = {source: plain.objective(tokens[source], values[source], args) for source in SOURCES}
            (-sum(objectives.values())).backward()
            if index == 0:
                gradient = plain.norm([parameter.grad for parameter in parameters.values()])
                assert log["kd/critic_grad_norm"] == pytest.approx(gradient, rel=1e-5)
                for source in SOURCES if args.gamma == 1.0 else ():  # it is logged undiscounted
                    value = objectives[source].item()
                    assert log[f"kd/{source}/critic_objective"] == pytest.approx(value, rel=1e-5, abs=1e-7)
            adam.step()
        after = trainer.critics_after(step)
        for source in SOURCES:
            found, expected = (
                plain.critic_values(weights, source, tokens[source].features, embeddings, args)
                for weights in (after, parameters)
            )
            assert expected.abs().mean() > 0.05
            # Small beside a step, which moves values by 0.1 and more; see above for what is left
            torch.testing.assert_close(found, expected.detach(), rtol=0, atol=5e-3)
            assert (found - expected).abs().mean() < 1e-4
        for name, parameter in parameters.items():
            torch.testing.assert_close(after[name].double(), parameter.detach(), rtol=1e-3, atol=5e-3)


def test_critics_learning_rate_is_logged(games):
    rate = games[0].args.critic_learning_rate
    assert logged(games[0], "kd/critic_learning_rate") == pytest.approx([rate, rate], rel=1e-6)


def test_student_loss_and_gradient_equal_plain_logits(games, tokenizer):
    trainer = games[1]
    args, embeddings = trainer.args, plain.embeddings_of(tokenizer)
    for student, tokens, critics_met, log in steps_of(trainer, tokenizer):
        loss = 0.0
        for source, share in zip(SOURCES, (1 - args.on_policy_weight, args.on_policy_weight), strict=True):
            these = tokens[source]
            values = plain.critic_values(critics_met, source, these.features, embeddings, args)
            loss = loss + share * (these.discount * plain.moments(these, values)).mean()
            kl = (these.log_t.exp() * (these.log_t - these.log_s)).sum(-1)
            loss = loss + share * args.kl_loss_weight * kl.mean()
        off = tokens["off_policy"]
        loss = loss - args.sft_loss_weight * off.log_s.gather(-1, off.labels[:, None]).mean()
        gradients = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert log["grad_norm"] == pytest.approx(plain.norm(gradients), rel=1e-5)


def test_logged_values_of_critics_equal_plain_logits(games, tokenizer):
    trainer = games[1]
    args, embeddings = trainer.args, plain.embeddings_of(tokenizer)
    for step, (_, tokens, critics_met, log) in enumerate(steps_of(trainer, tokenizer)):
        for source in SOURCES:
            these = tokens[source]
            values, unseen = (
                plain.critic_values(parameters, source, these.features, embeddings, args)
                for parameters in (critics_met, trainer.record[step].critics)
            )
            largest = 2 * args.critic_bound * plain.total_variation(these).sum()
            taken = (these.log_t.exp() + these.log_s.exp()) / 2
            expected = {
                "moment": plain.moments(these, values).mean(),
                "tightness": plain.moments(these, values).sum() / largest,
                "saturation": (taken * values.abs()).sum(-1).mean(),
                "total_variation": plain.total_variation(these).mean(),
                "unseen_moment": plain.moments(these, unseen).mean(),
                "unseen_tightness": plain.moments(these, unseen).sum() / largest,
                "student_entropy": -(these.log_s.exp() * these.log_s).sum(-1).mean(),
            }
            for name, value in expected.items():
                assert log[f"kd/{source}/{name}"] == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name


def test_order_decides_which_critics_the_first_step_meets(games):
    trainer = games[0]
    first, second = trainer.state.log_history[:2]
    names = {which: [f"kd/{source}/{which}" for source in SOURCES] for which in ("moment", "unseen_moment")}
    # At the start critics are zero: what they have not seen yet has no moment, in either order
    assert [first[name] for name in names["unseen_moment"]] == [0.0, 0.0]
    assert min(second[name] for name in names["unseen_moment"]) > 0.02
    if trainer.args.critic_order == "after":
        assert [first[name] for name in names["moment"]] == [0.0, 0.0]
        # The student meets critics of the step before
        for name, unseen in zip(*names.values(), strict=True):
            assert second[name] == pytest.approx(second[unseen], rel=1e-5)
    else:
        assert min(first[name] for name in names["moment"]) > 0.1


def test_order_after_first_student_step_is_none(tokenizer, tmp_path):
    trainer = train(tokenizer, tmp_path, (2, 2), critic_order="after")
    assert logged(trainer, "grad_norm")[0] == 0.0 and logged(trainer, "grad_norm")[1] > 0.1
    assert same(trainer.record[0].student, trainer.record[1].student)
    assert not same(trainer.record[0].critics, trainer.record[1].critics)


def test_merge_keeps_the_order_of_tokens_and_what_all_sources_have():
    results = {
        "on_policy": LinearLoss(torch.tensor(2.0), {"both": torch.tensor([10.0, 30.0]), "one": torch.zeros(2)}),
        "off_policy": LinearLoss(torch.tensor(0.5), {"both": torch.tensor([20.0])}),
    }
    merged = critics.merge(results, torch.tensor([True, False, True]))
    assert merged.loss.item() == 2.5
    assert {name: value.tolist() for name, value in merged.values.items()} == {"both": [10.0, 20.0, 30.0]}


# Who is moved by what


class Watch(Recorder):
    """Looks at gradients right before the student's step, when critics that come after it have not risen yet."""

    def _before_optimizer_step(self):
        critics_have = [parameter.grad is not None for parameter in self.auxiliary.modules.parameters()]
        student_has = [parameter.grad is not None for parameter in self.model.parameters()]
        self.seen = (any(critics_have), all(student_has))
        super()._before_optimizer_step()
        self.left = any(parameter.grad is not None for parameter in self.auxiliary.modules.parameters())


@pytest.mark.parametrize("order", ["before", "after"])
def test_student_s_loss_leaves_no_gradient_on_critics(tokenizer, tmp_path, order):
    options = {
        "critic_order": order,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    trainer = build(tokenizer, tmp_path, Watch, **options)
    trainer.train()
    # In the order "after", the critics' first gradient comes from the same pass
    assert trainer.seen == (order == "after", True) and not trainer.left


class SeparatePass(Recorder):
    """In the order "after": keeps the critics' gradients of the student's pass, and those of a pass of their own."""

    def ascend(self, tokens, first_values=None):
        critics, parameters = self.auxiliary, self.auxiliary.critic_parameters()
        self.joint = [parameter.grad.clone() for parameter in parameters]
        self.joint_report = critics.ascend_once(tokens, first_values)
        for parameter in parameters:
            parameter.grad = None
        self.separate_report = critics.ascend_once(tokens, None)
        self.separate = [parameter.grad.clone() for parameter in parameters]
        super().ascend(tokens)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("head", ["tied", "full", "low_rank"])
def test_gradient_of_critics_from_the_student_s_pass_is_that_of_their_own(
    tokenizer, tmp_path, monkeypatch, head, gamma
):
    def ascend_once(critics, tokens, first_values):
        with monkeypatch.context() as patch:
            patch.setattr(critics, "_step", lambda names: torch.ones(()))
            patch.setattr(critics.args, "critic_steps", 1)
            return critics.ascend(tokens, first_values)

    monkeypatch.setattr(MomentCritics, "ascend_once", ascend_once, raising=False)
    trainer = train(
        tokenizer,
        tmp_path,
        (2, 2),
        trainer_class=SeparatePass,
        critic_order="after",
        critic_head=head,
        gamma=gamma,
        max_steps=2,
    )
    assert len(trainer.joint) == len(trainer.separate) >= 2
    for joint, separate in zip(trainer.joint, trainer.separate, strict=True):
        # Sums in another order; the student's and its own pass see the same float32 states
        torch.testing.assert_close(joint, separate, rtol=1e-4, atol=1e-5 * separate.abs().max().item())
    assert set(trainer.joint_report) == set(trainer.separate_report)
    for name, (total, count) in trainer.separate_report.items():
        found, weight = trainer.joint_report[name]
        assert found.item() == pytest.approx(total.item(), rel=1e-4, abs=1e-6) and weight == pytest.approx(count)


@pytest.mark.parametrize(("order", "split"), [("before", (4, 1)), ("before", (2, 2)), ("after", (2, 2))])
def test_ascent_moves_critics_and_neither_model(tokenizer, tmp_path, order, split):
    trainer = train(tokenizer, tmp_path, split, critic_order=order, learning_rate=0.0, max_steps=1)
    student, teacher = pair(tokenizer)
    assert same(weights(trainer.model), weights(student))
    assert same(weights(trainer.teacher.model), weights(teacher))
    assert all(parameter.grad is None for parameter in trainer.teacher.model.parameters())
    critics_now = weights(trainer.auxiliary.modules)
    for source in SOURCES:
        # Every entry by five steps that are, at most, the rate times sqrt(1 / (1 - 0.9))
        assert 0.1 < critics_now[f"{source}.weight"].abs().mean() < 5 * 0.1 * 10**0.5


@pytest.mark.parametrize(("lmbda", "source"), [(0.0, "off_policy"), (1.0, "on_policy")])
def test_one_source_has_one_critic(tokenizer, tmp_path, lmbda, source):
    trainer = train(tokenizer, tmp_path, (2, 2), lmbda=lmbda, eval_dataset=tiny_dataset(4))
    assert list(trainer.auxiliary.modules) == [source]
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log[f"kd/{source}/moment"], rel=1e-5)
    assert log[f"kd/{source}/tightness"] > 0.3
    metrics = trainer.evaluate()
    # Evaluation is off-policy; without a critic of it there is no moment, but a distance all the same
    assert metrics["eval_loss"] == metrics["eval_kd/off_policy/total_variation"] > 0.1
    assert ("eval_kd/off_policy/moment" in metrics) == (lmbda == 0.0)


@pytest.mark.parametrize("order", ["before", "after"])
def test_evaluation_changes_nothing_of_the_run(tokenizer, tmp_path, order):
    runs = {}
    for name, options in (("plain", {}), ("evaluated", {"eval_strategy": "steps", "eval_steps": 1})):
        runs[name] = train(
            tokenizer, tmp_path / name, critic_order=order, eval_dataset=tiny_dataset(4), max_steps=3, **options
        )
    moments = logged(runs["evaluated"], "eval_kd/off_policy/moment")
    assert len(moments) == 3 and min(moments) > 0.02
    assert logged(runs["plain"], "loss") == logged(runs["evaluated"], "loss")
    assert same(*(weights(run.auxiliary.modules) for run in runs.values()))
    assert same(*(weights(run.model) for run in runs.values()))


def test_look_ahead_with_dropout_sees_the_plain_student_and_draws_nothing(tokenizer, tmp_path, monkeypatch):
    look_ahead, runs = kd_trainer.look_ahead, []

    def watched(trainer, batches):
        trainer.model.train()
        before = torch.get_rng_state()
        look_ahead(trainer, batches)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(module.training for module in trainer.model.modules())
        runs.append(trainer)

    monkeypatch.setattr(kd_trainer, "look_ahead", watched)
    for probability in (0.0, 0.4):
        student, teacher = pair(tokenizer, "gpt2")
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = probability
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lmbda": 0.0, "max_steps": 1}
        build(tokenizer, tmp_path, models=(student, teacher), critic_features="both", **options).train()
    assert len(runs) == 2
    # The critics rose on the same states; the student's loss then was of others
    assert same(*(weights(run.auxiliary.modules) for run in runs))
    assert abs(logged(runs[0], "loss")[0] - logged(runs[1], "loss")[0]) > 1e-3


@pytest.mark.parametrize(("order", "accumulation", "reads"), [("before", 2, 4), ("after", 2, 2), ("before", 1, 1)])
def test_order_before_costs_one_more_forward_of_the_student_under_accumulation(
    tokenizer, tmp_path, order, accumulation, reads
):
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 1, "lmbda": 0.0}
    trainer = build(tokenizer, tmp_path, critic_order=order, **options)
    calls = {"student": 0, "teacher": 0}

    def count(name):
        calls[name] += 1

    trainer.model.get_decoder().register_forward_hook(lambda *args: count("student"))
    trainer.teacher.model.get_decoder().register_forward_hook(lambda *args: count("teacher"))
    trainer.train()
    assert calls == {"student": reads, "teacher": accumulation}


# Memory, settings, files


def test_critics_that_do_not_fit_raise_before_training(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(critics, "free_memory", lambda device: 500_000)
    vocab_size = len(tokenizer)
    full, low_rank, tied = 2 * 16 * vocab_size * 48, 2 * 16 * 8 * (vocab_size + 48), 2 * (16 + 4) * 48 * 48
    assert low_rank < 500_000 and tied < 500_000 < full  # 0.59, 0.11 and 0.09 MB
    with pytest.raises(ValueError) as error:
        build(tokenizer, tmp_path, critic_head="full", critic_rank=8)
    assert str(error.value) == (
        'The critics with `critic_head="full"` take 0.00 GB with gradients and Adam, but 0.00 GB are free on cpu. '
        'Take another head ("low_rank": 0.00 GB, "tied": 0.00 GB), or `critic="exact"`, which takes none.'
    )
    for head in ("tied", "low_rank"):
        assert len(build(tokenizer, tmp_path, critic_head=head, critic_rank=8).auxiliary.modules) == 2
    monkeypatch.setattr(critics, "free_memory", lambda device: None)
    assert len(build(tokenizer, tmp_path, critic_head="full").auxiliary.modules) == 2


@pytest.mark.parametrize(("lmbda", "count", "size"), [(0.5, 2, "17.43 GB"), (1.0, 1, "8.71 GB")])
def test_critics_of_a_large_vocabulary_raise_with_their_size(monkeypatch, tmp_path, lmbda, count, size):
    monkeypatch.setattr(critics, "free_memory", lambda device: 8_000_000_000)
    head = LMHead(torch.empty(151_936, 3_584, device="meta"))
    options = {"critic": "value_head", "critic_head": "full", "critic_features": "teacher", "lmbda": lmbda}
    args = AMMConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    device = torch.device("cpu")
    others = {2: '"low_rank": 0.16 GB, "tied": 0.51 GB', 1: '"low_rank": 0.08 GB, "tied": 0.26 GB'}[count]
    message = rf"take {size} with gradients and Adam, but 8.00 GB are free on cpu. Take another head \({others}\)"
    with pytest.raises(ValueError, match=message):
        critics.make_critics(args, 1_024, head, device)


def test_smallest_critics_that_do_not_fit_raise_and_name_no_other(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(critics, "free_memory", lambda device: 1_000)
    with pytest.raises(ValueError, match='but 0.00 GB are free on cpu. Take .*`critic="exact"`') as error:
        build(tokenizer, tmp_path, critic_head="tied")
    assert "()" not in str(error.value)


def test_critics_log_their_size(tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="trl_kd"):
        build(tokenizer, tmp_path)
        build(tokenizer, tmp_path, lmbda=1.0)
    lines = [record.message for record in caplog.records if "critics take" in record.message]
    assert lines == [f"The {n} critics take 0.00 GB with gradients and Adam." for n in (2, 1)]


def test_free_memory_of_a_cpu_is_below_all_of_it():
    free = critics.free_memory(torch.device("cpu"))
    assert 2**20 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert critics.free_memory(torch.device("meta")) is None


def test_critic_head_does_not_ask_for_the_rank_of_another(tokenizer, tmp_path):
    # 32 features of the student, and 32 is the default rank of a head that is not taken
    for head in ("tied", "full"):
        trainer = build(tokenizer, tmp_path, critic_features="student", critic_head=head)
        assert list(trainer.auxiliary.modules) == list(SOURCES)
    with pytest.raises(ValueError, match="`rank` is 32, but the critic has 32 features"):
        build(tokenizer, tmp_path, critic_features="student", critic_head="low_rank")


def test_critics_of_both_sources_start_apart(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, critic_head="low_rank", critic_rank=4)
    projections = [trainer.auxiliary.modules[source].projection for source in SOURCES]
    assert (projections[0] - projections[1]).abs().mean() > 1.0


@pytest.mark.parametrize(("features", "width"), [("teacher", 48), ("both", 80)])
def test_critic_features_set_the_width_of_critics(tokenizer, tmp_path, features, width):
    trainer = build(tokenizer, tmp_path, critic_features=features, critic_head="full", critic_bound=0.6)
    critic = trainer.auxiliary.modules["on_policy"]
    assert critic.weight.shape == (len(tokenizer), width) and critic.bound == 0.6


def test_betas_from_yaml_may_be_whole_numbers(tokenizer, tmp_path):
    trainer = train(tokenizer, tmp_path, max_steps=1, critic_betas=[0, 0.5], lmbda=0.0)
    assert trainer.auxiliary.critic_optimizer.param_groups[0]["betas"] == (0.0, 0.5)
    weight = trainer.auxiliary.modules["off_policy"].weight
    assert weight.abs().mean() > 0.1


def test_saved_student_has_no_critic(games, tokenizer, tmp_path):
    games[0].save_model(str(tmp_path))
    assert load_file(tmp_path / "model.safetensors").keys() == weights(pair(tokenizer)[0]).keys()
    assert [name for name in os.listdir(tmp_path) if "aux" in name or "critic" in name] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic_head": "wide"}, "`critic_head` is 'wide', which does not exist. Choose one of 'full', 'low_rank', "),
        ({"critic_features": "none"}, "`critic_features` is 'none', which does not exist. Choose one of 'teacher', "),
        ({"critic_order": "during"}, "`critic_order` is 'during', which does not exist. Choose one of 'before', "),
        ({"critic_rank": 0}, "`critic_rank` is 0, but it is the width of two matrices. Set it non-negative"),
        ({"critic_steps": 0}, "`critic_steps` is 0, but it is the number of steps of a critic that must answer"),
        ({"critic_penalty": -0.1}, "`critic_penalty` is -0.1, but it is the weight of a penalty. Set it non-negative"),
        ({"critic_learning_rate": 0.0}, "`critic_learning_rate` is 0.0, so the critic stays zero. Set it above 0."),
        ({"critic_bound": -1.0}, "`critic_bound` is -1.0, so the critic stays zero. Set it above 0."),
        ({"critic_betas": [0.9]}, r"`critic_betas` is \[0.9\], but Adam takes two coefficients in \[0, 1\). Set both"),
        ({"critic_betas": [0.0, 1.0]}, r"`critic_betas` is \[0.0, 1.0\], but Adam takes two coefficients"),
        ({"critic_betas": [-0.1, 0.9]}, r"`critic_betas` is \[-0.1, 0.9\], but Adam takes two coefficients"),
    ],
)
def test_config_of_critics_bad_value_raises(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        AMMConfig(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize("head", ["full", "low_rank", "tied"])
def test_ascend_inside_of_autocast_equals_one_outside(head):
    """The trainer calls it within its own autocast, which caches rounded weights and rounds what runs in it."""

    def critics_after(context):
        args = AMMConfig("unused", critic="value_head", critic_steps=4, use_cpu=True)
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        generator = torch.Generator().manual_seed(0)
        teacher, student = (LMHead(torch.randn(20, width, generator=generator)) for width in (8, 6))
        hidden = [torch.randn(12, width, generator=generator) for width in (8, 6)]
        pairs = {"student": (hidden[1], student), "teacher": (hidden[0], teacher)}
        on_policy = torch.arange(12) % 2 == 0
        shares = torch.full((12,), 1 / 12), torch.full((12,), 1 / 6)
        tokens = TokenBatch(pairs, torch.zeros(12, dtype=torch.long), *shares, on_policy, torch.arange(12))
        heads = {name: ValueHead(head, 14, teacher, rank=3) for name in ("off_policy", "on_policy")}
        critics = MomentCritics(heads, args, accelerator)
        critics.start(1)
        with accelerator.autocast() if context == "inside" else nullcontext():
            critics.ascend([tokens])
        return critics.modules.state_dict()

    inside, outside = critics_after("inside"), critics_after("outside")
    assert all(torch.equal(inside[name], outside[name]) for name in outside)
    assert all(inside[f"{name}.weight"].abs().max() > 0.1 for name in ("off_policy", "on_policy"))


def test_module_beside_the_critics_steps_with_the_student_and_they_by_themselves(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    args = config(tmp_path, critic="value_head", aux_learning_rate=0.25)
    trainer = ProjectingTrainer(student, teacher, args, tiny_dataset(), processing_class=tokenizer)
    before = weights(trainer.auxiliary.modules)
    trainer.train()
    moved = {name: (after - before[name]).abs().max() for name, after in weights(trainer.auxiliary.modules).items()}
    assert moved["projector.weight"] > 0.2  # one step of AdamW is its learning rate at least
    assert all(moved[f"{source}.weight"] > 0.05 for source in SOURCES)
    optimizers = trainer.auxiliary.optimizers()
    assert list(optimizers) == ["optimizer", "scheduler", "critic_optimizer"]
    sizes = [sum(len(group["params"]) for group in optimizers[name].param_groups) for name in list(optimizers)[::2]]
    assert sizes == [2, 2]
    assert len(logged(trainer, "kd/aux_grad_norm")) == len(logged(trainer, "kd/critic_grad_norm")) == 2


@pytest.mark.parametrize("order", ["before", "after"])
def test_micro_batch_without_trained_tokens_is_zero_and_connected(tokenizer, tmp_path, order):
    trainer = build(tokenizer, tmp_path, critic_order=order)
    batch = trainer.data_collator([{"input_ids": [5, 6, 7], "labels": [-100] * 3, "prompt_length": 3}] * 2)
    trainer.auxiliary.start(1)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    assert loss.item() == 0.0
    gradients = [parameter.grad for parameter in trainer.model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    # Each rank joins in the ascent, whatever it has seen
    assert len(trainer._seen) == (order == "after")


def test_source_that_a_step_lacks_leaves_its_critic_alone(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, per_device_train_batch_size=1, lmbda=0.5, max_steps=6)
    trainer.train()
    rollouts = len(logged(trainer, "kd/on_policy/completion_length"))
    assert 0 < rollouts < 6
    state = trainer.auxiliary.critic_optimizer.state
    steps = {name: state[trainer.auxiliary.modules[name].weight]["step"].item() for name in SOURCES}
    assert steps == {"off_policy": 5 * (6 - rollouts), "on_policy": 5 * rollouts}


@pytest.mark.parametrize("head", ["full", "low_rank", "tied"])
def test_critic_of_a_float16_teacher_rises_as_one_in_float32(head):
    """At a width where unscaled states, or their gradients, leave the range of float16."""
    generator = torch.Generator().manual_seed(0)
    heads = dict.fromkeys((torch.float16, torch.float32))
    weight = torch.randn(64, 1024, generator=generator) * 3
    features = torch.randn(8, 1024, generator=generator)
    target = torch.randn(8, 64, generator=generator).sign() * 1e-6
    for dtype in heads:
        embeddings = LMHead(weight.to(dtype))
        critic = ValueHead(head, 1024, embeddings, rank=16)
        optimizer = torch.optim.Adam(critic.parameters(), lr=0.1, betas=(0.0, 0.9))
        for _ in range(3):
            optimizer.zero_grad()
            (-(critic(features, embeddings) * target).sum()).backward()
            optimizer.step()
        heads[dtype] = (critic(features, embeddings) * target).sum().item()
    assert heads[torch.float32] > 1e-6
    assert heads[torch.float16] == pytest.approx(heads[torch.float32], rel=1e-2)


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
@pytest.mark.parametrize("options", [{"critic": "value_head"}, {"on_policy_gradient": "full", "critic": "exact"}])
def test_heads_outside_of_a_forward_are_refused_where_weights_are_put_away(tokenizer, tmp_path, engine, options):
    trainer = build(tokenizer, tmp_path, **options)
    setattr(trainer, engine, True)
    with pytest.raises(
        NotImplementedError, match="needs the output heads outside of a forward, where DeepSpeed and FSDP"
    ):
        trainer.auxiliary_modules()


def test_tokens_of_a_step_that_was_cut_off_are_forgotten(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, critic_order="after")
    trainer._seen = ["left over"]
    assert trainer.get_batch_samples(iter([]), 1, torch.device("cpu")) == ([], None)
    assert trainer._seen == []
