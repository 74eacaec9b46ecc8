"""What an objective sees of a few rows of logits, and how it says what their gradient is.

An objective D of one row depends on the student's logits through its probabilities q. With slope_v = dD/dq_v, the
gradient at the logits is q_v (slope_v - sum_u q_u slope_u). So objectives only hand in slopes, or where those would
divide by q, flows q_v slope_v; the sums over all objectives are taken back through the softmax once. Softmaxes and
differences are made once per block, too, whoever asks for them.

Blocks are small enough to stay in the cache of a CPU, and everything is written into buffers that the next block uses
again: a fresh tensor would cost more than the arithmetic on it.
"""

from collections.abc import Callable

import torch


class Scratch:
    r"""
    Buffers for the intermediate tensors of a block, used again by the next block.

    Args:
        numel (`int`):
            Elements of a buffer; 0 to allocate afresh each time, which is what a compiler wants.
        dtype (`torch.dtype`):
            Of all buffers.
        device (`torch.device`):
            Where they live.
    """

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device):
        self.numel, self.dtype, self.device = numel, dtype, device
        self._buffers: list[torch.Tensor] = []
        self._views: dict[tuple[int, torch.Size], torch.Tensor] = {}
        self._used = 0

    def restart(self) -> None:
        """All buffers are free."""
        self._used = 0

    def like(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A free buffer of this shape, to be an `out=`; `None` where fresh tensors are better."""
        if not self.numel:
            return None
        if self._used == len(self._buffers):
            self._buffers.append(torch.empty(self.numel, dtype=self.dtype, device=self.device))
        key = self._used, tensor.shape
        if key not in self._views:
            self._views[key] = self._buffers[self._used][: tensor.numel()].view(tensor.shape)
        self._used += 1
        return self._views[key]


class Distribution:
    """Softmax of one model's logits `(n, V)` at one temperature, and the gradient that objectives ask for."""

    def __init__(self, logits: torch.Tensor, kd_temperature: float, scratch: Scratch, is_careful: bool):
        self.kd_temperature, self.scratch, self.is_careful = kd_temperature, scratch, is_careful
        take = scratch.like
        if kd_temperature != 1.0:
            logits = torch.div(logits, kd_temperature, out=take(logits))
        self.probs = torch.softmax(logits, dim=1, out=take(logits))
        # The largest logit has e^0 / sum; its log is exact enough only if the sum is, which the kernel's is not
        log_total = self.probs.sum(dim=1, keepdim=True).div_(self.probs.amax(dim=1, keepdim=True)).log_()
        log_probs = torch.sub(logits, logits.amax(dim=1, keepdim=True), out=take(logits))
        self.log_probs = log_probs.sub_(log_total)
        self._slope: torch.Tensor | None = None
        self._flow: torch.Tensor | None = None

    def add_slope(self, slope: torch.Tensor, weights: torch.Tensor) -> None:
        """Add `weights * dD/dq`, of shapes `(n, V)` and `(n,)`."""
        self._slope = self._add(self._slope, slope, weights)

    def add_flow(self, flow: torch.Tensor, weights: torch.Tensor) -> None:
        """Add `weights * q dD/dq`."""
        self._flow = self._add(self._flow, flow, weights)

    def add_label_flow(self, labels: torch.Tensor, weights: torch.Tensor) -> None:
        """`add_flow` where it is 1 at the label and 0 elsewhere."""
        self._add_at(labels.unsqueeze(1), self._column(weights))

    def add_sparse_flow(self, ids: torch.Tensor, flow: torch.Tensor, weights: torch.Tensor) -> None:
        """`add_flow` at the tokens `ids`, `(n, K)`, and 0 elsewhere."""
        self._add_at(ids, flow * self._column(weights))

    def _add_at(self, ids: torch.Tensor, part: torch.Tensor) -> None:
        if self._flow is None:
            out = self.scratch.like(self.probs)
            self._flow = torch.zeros_like(self.probs) if out is None else out.zero_()
        self._flow.scatter_add_(1, ids, part)

    def _add(self, total: torch.Tensor | None, part: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        column = self._column(weights)
        if self.is_careful:  # zero times an infinite slope
            part = torch.where(column != 0, part, 0.0)
        if total is None:
            return torch.mul(part, column, out=self.scratch.like(part))
        return total.addcmul_(part, column)

    def _column(self, weights: torch.Tensor) -> torch.Tensor:
        return (weights if self.kd_temperature == 1.0 else weights / self.kd_temperature).unsqueeze(1)

    def gradient(self, out: torch.Tensor | None) -> torch.Tensor | None:
        """Gradient at the logits, `q slope - q sum(q slope)`; `None` if nothing asked for any."""
        total = self._flow
        if self._slope is not None:
            flow = self._slope.mul_(self.probs)
            total = flow if total is None else total.add_(flow)
        if total is None:
            return None
        return torch.addcmul(total, self.probs, total.sum(dim=1, keepdim=True), value=-1, out=out)


class Block:
    r"""
    A few rows of every model's logits.

    Args:
        logits (`dict[str, torch.Tensor]`):
            `(n, V)` by name, in float32 or float64.
        labels (`dict[str, torch.Tensor]`):
            Next tokens.
        trained (`set[str]`):
            Names whose gradient is wanted.
        scratch ([`Scratch`]):
            Buffers.
        is_careful (`bool`):
            Whether values and slopes may be infinite, so that these must not meet a zero.
    """

    def __init__(
        self,
        logits: dict[str, torch.Tensor],
        labels: dict[str, torch.Tensor],
        trained: set[str],
        scratch: Scratch,
        is_careful: bool,
    ):
        self.logits, self.labels, self.trained = logits, labels, trained
        self.scratch, self.is_careful = scratch, is_careful
        self._made: dict[tuple, torch.Tensor] = {}
        self._distributions: dict[tuple[str, float], Distribution] = {}
        self._gradients: dict[str, torch.Tensor] = {}

    def softmax(self, name: str, kd_temperature: float = 1.0) -> Distribution:
        """Next-token distribution of one model."""
        key = name, kd_temperature
        if key not in self._distributions:
            self._distributions[key] = Distribution(self.logits[name], kd_temperature, self.scratch, self.is_careful)
        return self._distributions[key]

    def once(self, key: tuple, make: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> torch.Tensor:
        """`make(*arguments, out=...)` of the shape of its first argument, the first time it is asked for."""
        if key not in self._made:
            self._made[key] = make(*arguments, out=self.scratch.like(arguments[0]))
        return self._made[key]

    def difference(self, teacher: str, student: str, kd_temperature: float = 1.0) -> torch.Tensor:
        """p - q"""
        p, q = self.softmax(teacher, kd_temperature).probs, self.softmax(student, kd_temperature).probs
        return self.once(("difference", teacher, student, kd_temperature), torch.sub, p, q)

    def total(self, teacher: str, student: str) -> torch.Tensor:
        """p + q"""
        p, q = self.softmax(teacher).probs, self.softmax(student).probs
        return self.once(("total", teacher, student), torch.add, p, q)

    def sign(self, teacher: str, student: str, kd_temperature: float = 1.0) -> torch.Tensor:
        """Sign of p - q."""
        difference = self.difference(teacher, student, kd_temperature)
        return self.once(("sign", teacher, student, kd_temperature), torch.sign, difference)

    def minus(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Difference of two tensors in a buffer of its own."""
        return torch.sub(left, right, out=self.scratch.like(left))

    def expected(
        self, probs: torch.Tensor, terms: torch.Tensor, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of `probs * terms` per row, and these products: a token of probability 0 adds nothing."""
        products = torch.mul(probs, terms, out=self.scratch.like(terms) if out is None else out)
        if self.is_careful:
            products = torch.where(probs > 0, products, 0.0)  # 0 * inf
        return products.sum(dim=1), products

    def dot(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Sum of products over the vocabulary, `(n,)`."""
        return torch.mul(left, right, out=self.scratch.like(left)).sum(dim=1)

    def add_gradient(self, name: str, gradient: torch.Tensor, weights: torch.Tensor) -> None:
        """Add `weights * dD/dlogits` for what is no distribution."""
        gradient = gradient.mul_(weights.unsqueeze(1))
        known = self._gradients.get(name)
        self._gradients[name] = gradient if known is None else known.add_(gradient)

    def gradient(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """Gradient of all objectives at one model's logits."""
        total = self._gradients.get(name)
        parts = [d for (owner, _), d in self._distributions.items() if owner == name]
        for part in parts:
            gradient = part.gradient(out if total is None else part.log_probs)
            if gradient is not None:
                total = gradient if total is None else total.add_(gradient)
        return total
