"""Sets of the teacher's most likely tokens of a state, on which temporal-difference losses look at the student.

The teacher's tokens of N states are `ids` and `log_probs`, both `(N, K)`, as `top_tokens` gives them: most likely
first, log-probabilities over the whole vocabulary, `-inf` where there is none. A set is a mask `(N, K)` over them.
All compute in at least float32.
"""

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64."""
    return x if x.dtype == torch.float64 else x.float()


def full_set(log_probs: torch.Tensor) -> torch.Tensor:
    r"""
    All of the teacher's tokens that are there.

    Args:
        log_probs (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens, sorted.

    Returns:
        `torch.Tensor` of shape `(N, K)`: a mask.

    Examples:

    ```python
    >>> full_set(torch.tensor([[0.6, 0.3, 0.0]]).log())
    tensor([[ True,  True, False]])
    ```
    """
    return log_probs > float("-inf")


def top_p_set(log_probs: torch.Tensor, p: float) -> torch.Tensor:
    r"""
    The shortest prefix of the teacher's tokens that holds the mass `p`: A_p(s) of the paper.

    The nucleus of sampling with `top_p`. Where all K tokens together hold less, all of them.

    Args:
        log_probs (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens, sorted.
        p (`float`):
            Mass in (0, 1].

    Returns:
        `torch.Tensor` of shape `(N, K)`: a mask.

    Raises:
        ValueError: If `p` is no mass.

    Examples:

    ```python
    >>> top_p_set(torch.tensor([[0.6, 0.3, 0.1]]).log(), 0.8)
    tensor([[ True,  True, False]])
    ```
    """
    check_mass("p", p)
    if p == 1.0:  # a rounded sum may be there before the last token
        return full_set(log_probs)
    probs = wide(log_probs).exp()
    before = probs.cumsum(dim=1) - probs
    return full_set(log_probs) & (before < p)


def check_mass(name: str, p: float) -> None:
    """Refuse what is no mass of probability."""
    if not 0.0 < p <= 1.0:
        raise ValueError(f"`{name}` is {p}, but it is a probability mass. Set it in (0, 1].")


def top_k_set(log_probs: torch.Tensor, k: int) -> torch.Tensor:
    r"""
    The teacher's `k` most likely tokens.

    Args:
        log_probs (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens, sorted.
        k (`int`):
            Number of tokens, at least 1.

    Returns:
        `torch.Tensor` of shape `(N, K)`: a mask.

    Raises:
        ValueError: If `k` is less than 1.

    Examples:

    ```python
    >>> top_k_set(torch.tensor([[0.6, 0.3, 0.1]]).log(), 1)
    tensor([[ True, False, False]])
    ```
    """
    if k < 1:
        raise ValueError(f"`k` is {k}, but it is a number of tokens. Set it to 1 or more.")
    return full_set(log_probs) & (torch.arange(log_probs.shape[1], device=log_probs.device) < k)


def min_p_set(log_probs: torch.Tensor, min_p: float) -> torch.Tensor:
    r"""
    The tokens that have at least the share `min_p` of the probability of the most likely one.

    Args:
        log_probs (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens, sorted.
        min_p (`float`):
            Share in (0, 1].

    Returns:
        `torch.Tensor` of shape `(N, K)`: a mask.

    Raises:
        ValueError: If `min_p` lies outside of (0, 1].

    Examples:

    ```python
    >>> min_p_set(torch.tensor([[0.6, 0.3, 0.1]]).log(), 0.4)
    tensor([[ True,  True, False]])
    ```
    """
    check_mass("min_p", min_p)
    return full_set(log_probs) & (log_probs.exp() >= min_p * log_probs[:, :1].exp())


def threshold_set(log_probs: torch.Tensor, threshold: float) -> torch.Tensor:
    r"""
    The tokens of at least the probability `threshold`, and the most likely one in any case.

    Args:
        log_probs (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens, sorted.
        threshold (`float`):
            Probability in (0, 1].

    Returns:
        `torch.Tensor` of shape `(N, K)`: a mask.

    Raises:
        ValueError: If `threshold` lies outside of (0, 1].

    Examples:

    ```python
    >>> threshold_set(torch.tensor([[0.6, 0.3, 0.1]]).log(), 0.25)
    tensor([[ True,  True, False]])
    ```
    """
    check_mass("threshold", threshold)
    is_first = torch.arange(log_probs.shape[1], device=log_probs.device) == 0
    return full_set(log_probs) & ((log_probs.exp() >= threshold) | is_first)


def contains(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""
    Whether the token of the data is in the set.

    Args:
        ids (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens.
        mask (`torch.Tensor` of shape `(N, K)`):
            The set.
        labels (`torch.Tensor` of shape `(N,)`):
            Tokens of the data.

    Returns:
        `torch.Tensor` of shape `(N,)`, bool.

    Examples:

    ```python
    >>> contains(torch.tensor([[5, 7], [5, 7]]), torch.tensor([[True, False]] * 2), torch.tensor([5, 7]))
    tensor([ True, False])
    ```
    """
    return ((ids == labels.unsqueeze(1)) & mask).any(dim=1)


def union_with_label(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The set with the token of the data, in one column more, which is used where the set has not got it.

    Args:
        ids (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens.
        mask (`torch.Tensor` of shape `(N, K)`):
            The set.
        labels (`torch.Tensor` of shape `(N,)`):
            Tokens of the data.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shapes `(N, K + 1)`: ids and mask.

    Examples:

    ```python
    >>> union_with_label(torch.tensor([[5, 7]]), torch.tensor([[True, False]]), torch.tensor([7]))
    (tensor([[5, 7, 7]]), tensor([[ True, False,  True]]))
    ```
    """
    is_missing = ~contains(ids, mask, labels)
    column = labels.unsqueeze(1)
    return torch.cat([ids, column], dim=1), torch.cat([mask, is_missing.unsqueeze(1)], dim=1)
