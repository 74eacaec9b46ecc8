import math

import pytest
import torch
from torch.func import functional_call

from trl_kd.modules import LMHead, ValueHead, critic_features, planned_bytes


HEADS = pytest.mark.parametrize("name", ["full", "low_rank", "tied"])
NUM_ACTIONS, WIDTH, NUM_FEATURES, RANK = 11, 5, 6, 3
# Weights that put values well between zero and the bound
SPREAD = {"full": 0.3, "low_rank": 1.0, "tied": 0.1}
# Of float32, through two products of a handful of numbers and a tanh of order 1
TOLERANCE = 1e-5


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(name, bound=1.0, dtype=torch.float64, random=True, **overrides):
    """A critic, and the embeddings it was made from; with random weights, or as it starts."""
    embeddings = LMHead(normal(NUM_ACTIONS, WIDTH, seed=1, dtype=dtype))
    arguments = {"num_features": NUM_FEATURES, "embeddings": embeddings, "bound": bound, "rank": RANK}
    critic = ValueHead(name, **(arguments | overrides)).to(dtype)
    if random:
        with torch.no_grad():
            for index, parameter in enumerate(critic.parameters()):
                parameter.copy_(SPREAD[name] * normal(*parameter.shape, seed=2 + index))
    return critic, arguments["embeddings"]


def loop_values(critic, features, embeddings):
    """f(s, y) from the definitions, one number at a time."""
    size = features.shape[1]
    weight, rows = critic.weight.tolist(), []
    for x in features.tolist():
        if critic.head == "full":
            z = [8 / size * sum(w * number for w, number in zip(row, x, strict=True)) for row in weight]
        elif critic.head == "low_rank":
            projected = [sum(p * n for p, n in zip(row, x, strict=True)) / size for row in critic.projection.tolist()]
            z = [8 / len(projected) * sum(w * s for w, s in zip(row, projected, strict=True)) for row in weight]
        else:
            states = [sum(w * n for w, n in zip(row, x, strict=True)) for row in weight]  # A x
            whitened = [sum(c * s for c, s in zip(row, states, strict=True)) for row in critic.whitening.tolist()]
            scale = 80 / (len(states) * size)
            z = [scale * sum(e * s for e, s in zip(row, whitened, strict=True)) for row in embeddings.weight.tolist()]
        rows.append([critic.bound * math.tanh(number) for number in z])
    return torch.tensor(rows, dtype=torch.float64)


# Features


def test_critic_features_literal_states_have_root_mean_square_one():
    features = critic_features(torch.tensor([[3.0, -4.0, 0.0, 0.0], [1e-3, 1e-3, 1e-3, -1e-3]]))
    # The mean square of the first is 25 / 4
    torch.testing.assert_close(features, torch.tensor([[1.2, -1.6, 0.0, 0.0], [1.0, 1.0, 1.0, -1.0]]))


def test_critic_features_several_models_are_scaled_apart_and_joined_in_order():
    features = critic_features(torch.tensor([[2.0, -2.0]]), torch.tensor([[300.0, 0.0, -300.0, 0.0]]))
    torch.testing.assert_close(features, torch.tensor([[1.0, -1.0, 2**0.5, 0.0, -(2**0.5), 0.0]]))


def test_critic_features_zero_states_are_zero():
    features = critic_features(torch.tensor([[0.0, 0.0], [5.0, 5.0]]))
    assert features.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_critic_features_no_rows_keep_their_width():
    assert critic_features(torch.zeros(0, 3), torch.zeros(0, 4)).shape == (0, 7)


def test_critic_features_carry_no_gradient():
    hidden = torch.ones(2, 3, requires_grad=True)
    assert not critic_features(hidden, torch.ones(2, 2)).requires_grad


def test_critic_features_float64_stays_and_half_precision_is_computed_in_float32():
    hidden = normal(4, 6, seed=0)
    features = critic_features(hidden)
    assert features.dtype == torch.float64
    torch.testing.assert_close(features.square().mean(-1), torch.ones(4, dtype=torch.float64), rtol=1e-14, atol=0)
    half = hidden.bfloat16()
    assert critic_features(half).dtype == torch.float32
    assert torch.equal(critic_features(half), critic_features(half.float()))
    # 300^2 is beyond the range of float16
    assert critic_features(torch.tensor([[300.0, -300.0]], dtype=torch.float16)).tolist() == [[1.0, -1.0]]


# Values


@HEADS
def test_value_head_at_the_start_is_zero(name):
    critic, embeddings = make(name, random=False)
    values = critic(normal(4, NUM_FEATURES, seed=0), embeddings)
    assert torch.equal(values, torch.zeros(4, NUM_ACTIONS, dtype=torch.float64))


@pytest.mark.parametrize("bound", [1.0, 0.3])
@HEADS
def test_value_head_random_weights_equal_the_loop(name, bound):
    critic, embeddings = make(name, bound)
    features = normal(3, NUM_FEATURES, seed=0)
    values = critic(features, embeddings)
    assert values.shape == (3, NUM_ACTIONS) and 0.2 * bound < values.abs().mean() < 0.95 * bound
    # A few roundings of float64; the whitening matrix is symmetric to the rounding of float32
    tolerance = 1e-6 if name == "tied" else 1e-13
    torch.testing.assert_close(values, loop_values(critic, features, embeddings), rtol=0, atol=tolerance)


@HEADS
def test_value_head_float32_equals_float64(name):
    critic, embeddings = make(name)
    features = normal(3, NUM_FEATURES, seed=0)
    expected = critic(features, embeddings)
    values = critic.float()(features.float(), LMHead(embeddings.weight.float()))
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=TOLERANCE)


@HEADS
def test_value_head_huge_features_reach_the_bound_and_stay_within(name):
    critic, embeddings = make(name, bound=0.7)
    values = critic(1e9 * normal(3, NUM_FEATURES, seed=0), embeddings)
    assert torch.equal(values.abs(), torch.full_like(values, 0.7))


@HEADS
def test_value_head_forward_is_the_head_of_its_pair_on_the_states(name):
    critic, embeddings = make(name, bound=0.5)
    features = normal(4, NUM_FEATURES, seed=0)
    states, head = critic.pair(features, embeddings)
    widths = {"full": NUM_FEATURES, "low_rank": RANK, "tied": WIDTH}
    assert states.shape == (4, widths[name]) and head.weight.shape == (NUM_ACTIONS, widths[name])
    assert torch.equal(head(states), critic(features, embeddings))


@pytest.mark.parametrize("name", ["low_rank", "tied"])
def test_value_head_states_under_autocast_are_not_rounded(name):
    critic, embeddings = make(name, dtype=torch.float32)
    features = normal(4, NUM_FEATURES, seed=0, dtype=torch.float32)
    expected = critic.pair(features, embeddings)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = critic.pair(features, embeddings)[0]
    assert states.dtype == torch.float32 and torch.equal(states, expected)


def test_value_head_bfloat16_embeddings_keep_the_weights_in_float32():
    embeddings = LMHead(normal(NUM_ACTIONS, WIDTH, seed=1).bfloat16())
    critic = ValueHead("tied", NUM_FEATURES, embeddings)
    assert {tensor.dtype for tensor in critic.state_dict().values()} == {torch.float32}
    with torch.no_grad():
        critic.weight.copy_(0.1 * normal(WIDTH, NUM_FEATURES, seed=2))
    features = normal(3, NUM_FEATURES, seed=0, dtype=torch.float32)
    values = critic(features, embeddings)
    # States and values are rounded to 8 bits: 2^-8 of values below 1, over a sum of five
    expected = loop_values(critic, features, embeddings)
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=3e-2)


# Gradient


@HEADS
def test_value_head_gradients_equal_finite_differences(name):
    critic, embeddings = make(name)
    features = normal(2, NUM_FEATURES, seed=0)
    names = [key for key, _ in critic.named_parameters()]

    def values(*parameters):
        return functional_call(critic, dict(zip(names, parameters, strict=True)), (features, embeddings))

    assert names == (["weight", "projection"] if name == "low_rank" else ["weight"])
    assert torch.autograd.gradcheck(values, tuple(critic.parameters()))


@HEADS
def test_value_head_backward_reaches_its_own_parameters_alone(name):
    weight = normal(NUM_ACTIONS, WIDTH, seed=1).requires_grad_()
    hidden = normal(4, NUM_FEATURES, seed=0).requires_grad_()
    embeddings = LMHead(weight).detach()
    critic = ValueHead(name, NUM_FEATURES, embeddings, rank=RANK).double()
    (critic(critic_features(hidden), embeddings) * normal(4, NUM_ACTIONS, seed=3)).sum().backward()
    assert weight.grad is None and hidden.grad is None
    assert critic.weight.grad.abs().max() > 1e-3
    assert all(tensor.data_ptr() != embeddings.weight.data_ptr() for tensor in critic.state_dict().values())


@HEADS
def test_value_head_step_of_adam_moves_values_as_much_at_every_width(name):
    moved = []
    for width in (64, 256):
        embeddings = LMHead(normal(500, width, seed=1, dtype=torch.float32))
        critic = ValueHead(name, width, embeddings, rank=32)
        features = critic_features(normal(1, width, seed=9, dtype=torch.float32))
        optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
        (-critic(features, embeddings)[0, 7]).backward()
        optimizer.step()
        moved.append(critic(features, embeddings)[0, 7].item() / 1e-3)
    # A mean of 64 absolute normal numbers is off by a tenth; without the fan-in the ratio would be 4 or 16
    assert 0.7 < moved[1] / moved[0] < 1.4
    # The gain times E|x| of a normal number, once more for the embedding of the action
    expected = 80 * 2 / math.pi if name == "tied" else 8 * math.sqrt(2 / math.pi)
    assert moved[1] == pytest.approx(expected, rel=0.2)


# Whitening


def test_value_head_whitening_makes_the_second_moment_of_embeddings_the_identity():
    mixing = normal(4, 4, seed=5) + 2 * torch.eye(4, dtype=torch.float64)
    embeddings = normal(300, 4, seed=1) @ mixing + torch.tensor([0.5, -1.0, 0.0, 2.0])
    critic = ValueHead("tied", 3, LMHead(embeddings.float()))
    whitening = critic.whitening.double()
    torch.testing.assert_close(whitening, whitening.T, rtol=0, atol=TOLERANCE)
    whitened = embeddings @ whitening
    moment = whitened.T @ whitened / 300
    torch.testing.assert_close(moment, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-4)  # float32, conditioned


def test_value_head_whitening_of_more_rows_than_a_piece_counts_each_once():
    embeddings = normal(8192 + 100, 3, seed=1) * torch.tensor([1.0, 2.0, 0.5])
    embeddings[8192:] += 30.0  # a last piece that is left out or weighed wrongly shows
    whitened = embeddings @ ValueHead("tied", 2, LMHead(embeddings.float())).whitening.double()
    moment = whitened.T @ whitened / len(embeddings)
    torch.testing.assert_close(moment, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-4)


def test_value_head_whitening_directions_without_variance_stay_weak():
    # Second moment diag(1, 0): the mean is 1/2 and the floor 5e-4 of it in the second direction
    embeddings = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    whitening = ValueHead("tied", 3, LMHead(embeddings)).whitening
    torch.testing.assert_close(whitening, torch.diag(torch.tensor([1.0, 5e-4**-0.5])), rtol=1e-4, atol=1e-4)
    # Just above the floor it is whitened in full
    embeddings = torch.tensor([[1.0, 0.05], [-1.0, 0.05]])
    whitening = ValueHead("tied", 3, LMHead(embeddings)).whitening
    torch.testing.assert_close(whitening, torch.diag(torch.tensor([1.0, 20.0])), rtol=1e-4, atol=1e-3)


def test_value_head_zero_embeddings_have_zero_values():
    critic = ValueHead("tied", 3, LMHead(torch.zeros(4, 2)))
    with torch.no_grad():
        critic.weight.fill_(1.0)
    assert torch.equal(critic(torch.ones(2, 3), LMHead(torch.zeros(4, 2))), torch.zeros(2, 4))


# Low rank


def test_value_head_low_rank_projection_is_that_of_its_seed_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (make("low_rank", random=False, seed=seed)[0].projection for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and (first - other).abs().min() > 1e-3


def test_value_head_low_rank_projection_has_entries_of_size_root_of_the_width():
    critic = ValueHead("low_rank", 400, LMHead(torch.zeros(50, 8)), rank=40)
    # 16,000 draws: their spread is known to 0.6 %
    assert critic.projection.std().item() == pytest.approx(20.0, rel=0.03)
    states, _ = critic.pair(critic_features(normal(30, 400, seed=9)), LMHead(torch.zeros(50, 8)))
    assert (states / critic.scale).square().mean().item() == pytest.approx(1.0, rel=0.2)


# Memory


def allocated(critic, embeddings):
    """Bytes of all that training holds after one step of Adam."""
    optimizer = torch.optim.Adam(critic.parameters())
    critic(torch.ones(2, 40), embeddings).sum().backward()
    optimizer.step()
    tensors = [*critic.buffers()]
    for parameter in critic.parameters():
        state = optimizer.state[parameter]
        tensors += [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@HEADS
def test_value_head_bytes_are_those_that_training_allocates(name):
    embeddings = LMHead(normal(151, 28, seed=1, dtype=torch.float32))
    arguments = {"head": name, "num_features": 40, "embeddings": embeddings, "rank": 7}
    critic = ValueHead(**arguments)
    expected = {
        "full": 16 * 151 * 40,
        "low_rank": 16 * 7 * (151 + 40),
        "tied": 16 * 28 * 40 + 4 * 28 * 28,
    }
    assert critic.num_bytes == expected[name]
    assert planned_bytes(**(arguments | {"embeddings": embeddings.meta()})) == expected[name]
    assert allocated(critic, embeddings) == expected[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("full", 17_425_235_968),  # 2 x 16 x 151,936 x 3,584: 17.4 GB
        ("low_rank", 159_252_480),  # 2 x 16 x 32 x (151,936 + 3,584): 0.2 GB
        ("tied", 513_802_240),  # 2 x (16 + 4) x 3,584 x 3,584: 0.5 GB
    ],
)
def test_planned_bytes_two_critics_of_a_7b_teacher_have_the_figures_by_hand(name, expected):
    plan = LMHead(torch.empty(151_936, 3_584, device="meta", dtype=torch.bfloat16))
    assert 2 * planned_bytes(head=name, num_features=3_584, embeddings=plan) == expected
    assert (expected < 1e9) == (name != "full")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("full", 16 * 10**15), ("low_rank", 16 * 2 * (10**9 + 10**6)), ("tied", (16 + 4) * 10**12)],
)
def test_planned_bytes_of_what_no_machine_holds_are_told_all_the_same(name, expected):
    plan = LMHead(torch.empty(10**9, 10**6, device="meta"))
    assert planned_bytes(head=name, num_features=10**6, embeddings=plan, rank=2) == expected


# Errors


def test_value_head_unknown_head_raises():
    with pytest.raises(ValueError, match="`head` is 'wide', but there are only full, low_rank, tied. Name one of"):
        ValueHead("wide", 4, LMHead(torch.zeros(5, 4)))


@pytest.mark.parametrize(("num_features", "num_actions"), [(7, 9), (9, 7)])
def test_value_head_rank_that_saves_nothing_raises(num_features, num_actions):
    embeddings = LMHead(torch.zeros(num_actions, 3))
    message = f"`rank` is 7, but the critic has {num_features} features and {num_actions} actions, so nothing is saved"
    with pytest.raises(ValueError, match=message + '. Take a smaller rank, or the head "full"'):
        ValueHead("low_rank", num_features, embeddings, rank=7)
    assert ValueHead("low_rank", num_features, embeddings, rank=6).weight.shape == (num_actions, 6)
    assert ValueHead("full", num_features, embeddings, rank=7).weight.shape == (num_actions, num_features)
