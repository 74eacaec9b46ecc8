"""Token-weighted averages of what the loss reports, over micro-batches, logging interval and ranks."""

import torch
from accelerate.utils import gather_object

from trl_kd.generation import distinct_n


class MetricSums:
    """Sums and weights by name. They stay on the device until they are read."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._largest: dict[str, torch.Tensor] = {}

    def add(self, name: str, total: torch.Tensor | float, weight: torch.Tensor | float = 1.0) -> None:
        """Add a sum over `weight` tokens (or one value of weight 1)."""
        total, weight = torch.as_tensor(total).detach().double(), torch.as_tensor(weight).double()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._weights[name] = self._weights[name] + weight if name in self._weights else weight

    def add_largest(self, name: str, value: torch.Tensor) -> None:
        """Add a value of which the largest is shown."""
        value = value.detach().double()
        self._largest[name] = torch.maximum(self._largest[name], value) if name in self._largest else value

    def add_by_source(
        self, values: dict[str, torch.Tensor], is_on_policy: torch.Tensor, counted: torch.Tensor | None = None
    ) -> None:
        r"""
        Add per-token values, apart for off- and on-policy tokens.

        Args:
            values (`dict[str, torch.Tensor]`):
                Values of shape `(N,)` by name.
            is_on_policy (`torch.Tensor` of shape `(N,)`):
                Whether the student wrote the token.
            counted (`torch.Tensor` of shape `(N,)`, *optional*):
                Which tokens have these values. By default all.
        """
        for source, chosen in (("off_policy", ~is_on_policy), ("on_policy", is_on_policy)):
            chosen = chosen if counted is None else chosen & counted
            count = chosen.sum()
            for name, value in values.items():
                # `where` keeps shapes fixed: a boolean index would wait for the device
                total = torch.where(chosen, value, torch.zeros((), dtype=value.dtype, device=value.device)).sum()
                self.add(f"kd/{source}/{name}", total, count)

    def add_rollouts(self, completions: list[list[int]], eos_token_ids: list[int]) -> None:
        """Add what the student wrote in one step: variety, length, and whether it ended."""
        count = len(completions)
        if count:
            self.add("kd/on_policy/distinct_2", distinct_n(completions, 2))
            self.add("kd/on_policy/completion_length", sum(map(len, completions)), count)
            self.add("kd/on_policy/eos_rate", sum(ids[-1] in eos_token_ids for ids in completions), count)

    def pop(self) -> dict[str, float]:
        """Averages (and largest values) over all ranks since the last call; names without weight are left out."""
        local = {name: (self._sums[name].item(), self._weights[name].item()) for name in self._sums}
        largest = {name: value.item() for name, value in self._largest.items()}
        self.__init__()
        totals: dict[str, tuple[float, float]] = {}
        for rank, rank_largest in gather_object([(local, largest)]):
            for name, (total, weight) in rank.items():
                sums = totals.get(name, (0.0, 0.0))
                totals[name] = (sums[0] + total, sums[1] + weight)
            for name, value in rank_largest.items():
                totals[name] = (max(totals.get(name, (value, 1.0))[0], value), 1.0)
        return {name: total / weight for name, (total, weight) in sorted(totals.items()) if weight > 0}
