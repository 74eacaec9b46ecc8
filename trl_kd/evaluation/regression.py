"""Conditions on a change that make a build fail, such as `--fail-if "rouge_l < -0.5%"`.

A condition is about the change of a metric against a baseline: relative with `%`, in the metric's own unit without. It
is violated only if the change crosses the number and is distinguishable from none: noise fails no build. The price is
that a loss too small for the number of prompts passes; the interval says how large it may have been.
"""

import math
import re
from dataclasses import dataclass

from trl_kd.evaluation.bootstrap import Estimate


_CONDITION = re.compile(
    r"\s*(?P<metric>[A-Za-z_][\w./:-]*)\s*(?P<sign>[<>])\s*"
    r"(?P<threshold>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<percent>%?)\s*"
)


@dataclass(frozen=True)
class Condition:
    """
    A change of a metric that is not wanted.

    Args:
        metric (`str`):
            Name of the metric.
        sign (`str`):
            `"<"` for changes below the threshold, `">"` for those above it.
        threshold (`float`):
            The number that must not be crossed: in percent of the baseline if `relative`, else in the metric's unit.
            Not above 0 for `"<"` and not below 0 for `">"`.
        relative (`bool`):
            Whether the threshold is in percent of the baseline.

    Raises:
        ValueError: If the sign is unknown, or if no change at all would be beyond the threshold.
    """

    metric: str
    sign: str
    threshold: float
    relative: bool

    def __post_init__(self):
        if self.sign not in ("<", ">"):
            raise ValueError(
                f"`sign` is {self.sign!r}, but a change is below or above a number. Set it to '<' or '>'."
            )
        if not math.isfinite(self.threshold):
            raise ValueError(
                f"`--fail-if` has the number {self.threshold} for {self.metric}, which no change can cross. "
                "Write a finite number."
            )
        if self._is_beyond(0.0):
            raise ValueError(
                f"`--fail-if` has '{self}', which even a model without any change would meet: the number is a change "
                f"against the baseline. Write a number {'below' if self.sign == '<' else 'above'} 0, or 0."
            )

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.threshold:.12g}{'%' if self.relative else ''}"

    def violated(self, baseline_value: float, change: Estimate) -> bool:
        """
        Whether a change is one that is not wanted, and more than noise.

        Args:
            baseline_value (`float`):
                The metric of the baseline, of which a relative threshold is a share (of its size, where it is
                negative). Any change from 0 is infinite in percent.
            change ([`Estimate`]):
                The metric of the model less that of the baseline, from [`difference`].

        Returns:
            `bool`: `True` if the change is beyond the threshold and its interval excludes 0. A change without an
            interval, as with a single prompt, violates nothing.

        Raises:
            ValueError: If either value is NaN or infinite.

        Examples:

        ```python
        >>> condition = parse_condition("rouge_l < -0.5%")
        >>> condition.violated(20.0, Estimate(value=-1.0, low=-1.6, high=-0.4, standard_error=0.3))
        True
        >>> condition.violated(20.0, Estimate(value=-1.0, low=-2.2, high=0.2, standard_error=0.6))
        False
        ```
        """
        if not (math.isfinite(baseline_value) and math.isfinite(change.value)):
            raise ValueError(
                f"`--fail-if` '{self}' cannot be checked: the baseline is {baseline_value} and the change "
                f"{change.value}. Look for NaN in the values of {self.metric}, or leave the condition out."
            )
        amount = change.value
        if self.relative and amount != 0.0:
            share = amount / abs(baseline_value) if baseline_value else math.copysign(math.inf, amount)
            amount = 100.0 * share
        return self._is_beyond(amount) and change.excludes_zero

    def _is_beyond(self, amount: float) -> bool:
        return amount < self.threshold if self.sign == "<" else amount > self.threshold


def parse_condition(text: str) -> Condition:
    """
    Reads a condition of `--fail-if`.

    Args:
        text (`str`):
            `<metric> < <number>` or `<metric> > <number>`, where the number may end with `%`.

    Returns:
        [`Condition`]: whose `str` is the text again, with one space on each side of the sign. Whether there is such a
        metric is for its user to check.

    Raises:
        ValueError: If the text is no such condition, or if no change at all would meet it.

    Examples:

    ```python
    >>> parse_condition("rouge_l < -0.5%")
    Condition(metric='rouge_l', sign='<', threshold=-0.5, relative=True)
    ```
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"`--fail-if` has {text!r}, which is no condition on a change. Write <metric> < <number> or "
            "<metric> > <number>, with % for a relative change, such as 'rouge_l < -0.5%' or 'nll > 0.02'."
        )
    return Condition(match["metric"], match["sign"], float(match["threshold"]), bool(match["percent"]))
