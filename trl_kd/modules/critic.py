r"""The moment critic: a value head that scores every action (next token) of a state, within a bound.

    f(s, y) = B tanh(z(s, y)),    z linear in features of the state s

The bound is needed, since a moment is linear in f and would have no largest value. Three heads for z differ in what
they cost, with x(s) the features, V the vocabulary and H the width of x:

    full       z = w_y . x             V x H numbers: every action has values of its own
    low_rank   z = u_y . (P x)         (V + H) x r numbers: values of an action live in r dimensions
    tied       z = e_y . (C A x)       H_t x H numbers: actions with similar output embeddings e_y of the teacher have
                                       similar values; C whitens the embeddings and is fixed

All start at f = 0. Each is a product of trained states and an output head, so that `losses.linear` computes it chunk
by chunk beside the logits of the models. All of it is ours; what the paper's critic looks like is not known to us.

Note:
    Features have a root mean square of 1, and products are divided by their fan-in, so that one step of Adam, which
    moves each weight by its learning rate, moves the values by as much at every width. At H = 64 the head `full` is a
    linear map of features of norm 1.
"""

import math
from typing import Any

import torch
import torch.nn as nn

from trl_kd.modules.lm_head import LMHead


CRITIC_HEADS = ("full", "low_rank", "tied")

# sqrt(64): at that width, features of root mean square 1 that are divided by the fan-in over 8 have norm 1
_GAIN = 8.0
# One matrix serves all actions, whose gradients agree less than those of one action (measured: ten times)
_TIED_GAIN = 80.0
# Directions that the embeddings hardly use are left weak: relative to the mean variance of a direction
_WHITENING_FLOOR = 1e-3
# Parameter, gradient, and two moments of Adam, in float32
_BYTES_PER_PARAMETER = 16


def critic_features(*hidden_states: torch.Tensor) -> torch.Tensor:
    r"""
    What a critic sees of a state: detached hidden states, each scaled to a root mean square of 1.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., H_i)`):
            Last hidden states of one or more models at the same positions, any float dtype.

    Returns:
        `torch.Tensor` of shape `(..., sum of H_i)`, in float32 (or float64), without gradient. Zero for zero states.

    Examples:

    ```python
    >>> critic_features(torch.tensor([[3.0, -3.0]]), torch.tensor([[0.1]]))
    tensor([[ 1., -1.,  1.]])
    ```
    """
    parts = []
    for hidden in hidden_states:
        hidden = hidden.detach()
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        size = hidden.square().mean(dim=-1, keepdim=True).sqrt()
        parts.append(hidden / size.clamp_min(torch.finfo(hidden.dtype).tiny))
    return torch.cat(parts, dim=-1)


class ValueHead(nn.Module):
    r"""
    Bounded action values of a state, zero at the start.

    Args:
        head (`str`):
            `"full"`, `"low_rank"` or `"tied"`; see the module's description.
        num_features (`int`):
            Width of the features, H.
        embeddings ([`LMHead`]):
            The teacher's output head, detached and cut to the shared vocabulary. Its weight gives the number of
            actions and, for `"tied"`, their embeddings; it is no parameter of this module.
        bound (`float`, *optional*, defaults to `1.0`):
            Largest absolute value B.
        rank (`int`, *optional*, defaults to `32`):
            Dimensions r of `"low_rank"`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the projection of `"low_rank"`.

    Raises:
        ValueError: If `head` is unknown, or `rank` is not below the numbers of features and actions.

    Examples:

    ```python
    >>> critic = ValueHead("full", num_features=2, embeddings=LMHead(torch.zeros(3, 4)))
    >>> critic(torch.ones(1, 2))
    tensor([[0., 0., 0.]], grad_fn=<MulBackward0>)
    ```
    """

    def __init__(
        self,
        head: str,
        num_features: int,
        embeddings: LMHead,
        bound: float = 1.0,
        rank: int = 32,
        seed: int = 0,
    ):
        super().__init__()
        num_actions, width = embeddings.weight.shape
        if head not in CRITIC_HEADS:
            raise ValueError(f"`head` is {head!r}, but there are only {', '.join(CRITIC_HEADS)}. Name one of these.")
        if head == "low_rank" and rank >= min(num_features, num_actions):
            raise ValueError(
                f"`rank` is {rank}, but the critic has {num_features} features and {num_actions} actions, so nothing "
                'is saved. Take a smaller rank, or the head "full".'
            )
        self.head = head
        self.bound = bound
        shape = {"full": (num_actions, num_features), "low_rank": (num_actions, rank), "tied": (width, num_features)}
        self.weight = nn.Parameter(torch.zeros(shape[head]))
        self.scale = _GAIN / shape[head][1]  # of the weight's product
        if head == "low_rank":
            # Large beside a step of Adam, so that the directions turn slowly
            drawn = torch.randn(rank, num_features, generator=torch.Generator().manual_seed(seed), device="cpu")
            self.projection = nn.Parameter(drawn.to(self.weight.device) * math.sqrt(num_features))
        elif head == "tied":
            self.scale = _TIED_GAIN / (width * num_features)
            self.register_buffer("whitening", _whitening(embeddings.weight))

    def pair(self, features: torch.Tensor, embeddings: LMHead) -> tuple[torch.Tensor, LMHead]:
        r"""
        Trained states and output head whose product is f: a pair for [`~losses.linear_loss`].

        Args:
            features (`torch.Tensor` of shape `(N, H)`):
                What `critic_features` returns.
            embeddings ([`LMHead`]):
                As at the construction.

        Returns:
            `tuple[torch.Tensor, LMHead]`: states of shape `(N, ·)`, and a head with `head(states)` = f in `(N, V)`.
        """
        features = features.to(self.weight.dtype) * self.scale
        weight = self.weight
        if self.head == "low_rank":
            # Mixed precision would round what is summed next
            with torch.autocast(features.device.type, enabled=False):
                features = features @ self.projection.T / self.projection.shape[1]
        elif self.head == "tied":
            with torch.autocast(features.device.type, enabled=False):
                features = features @ self.weight.T @ self.whitening
            weight = embeddings.weight
            if weight.dtype == torch.float16 and not torch.is_autocast_enabled(features.device.type):
                weight = weight.float()  # its gradients would vanish
        # A head with scale and soft cap B computes B tanh(W x)
        return features, LMHead(weight, scale=self.bound, soft_cap=self.bound)

    def forward(self, features: torch.Tensor, embeddings: LMHead | None = None) -> torch.Tensor:
        r"""
        Action values of a few states; training computes them in chunks from `pair`.

        Args:
            features (`torch.Tensor` of shape `(N, H)`):
                What `critic_features` returns.
            embeddings ([`LMHead`], *optional*):
                As at the construction; needed by the head `"tied"` only.

        Returns:
            `torch.Tensor` of shape `(N, V)`: in `[-bound, bound]`.
        """
        states, head = self.pair(features, embeddings)
        return head(states)

    @property
    def num_bytes(self) -> int:
        """Bytes that training takes: parameters, gradients and both moments of Adam in float32, and what is fixed."""
        trained = sum(parameter.numel() for parameter in self.parameters()) * _BYTES_PER_PARAMETER
        return trained + sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


def _whitening(embeddings: torch.Tensor) -> torch.Tensor:
    """Symmetric C of shape `(H_t, H_t)` such that the rows of E C have the identity as mean outer product."""
    width = embeddings.shape[1]
    if embeddings.is_meta:
        return torch.empty(width, width)
    # In pieces: no float32 copy of all embeddings
    second = sum(part.float().T @ part.float() for part in embeddings.split(8192)) / len(embeddings)
    variance, directions = torch.linalg.eigh(second)
    floor = (_WHITENING_FLOOR * variance.mean()).clamp_min(torch.finfo(variance.dtype).tiny)
    return (directions * variance.clamp_min(floor).rsqrt()) @ directions.T


def planned_bytes(**arguments: Any) -> int:
    r"""
    Bytes that a [`ValueHead`] of these arguments would take in training; nothing is allocated.

    Args:
        arguments (`dict[str, Any]`):
            Those of [`ValueHead`]; `embeddings` may lie on the meta device.

    Returns:
        `int`
    """
    with torch.device("meta"):
        return ValueHead(**arguments).num_bytes
