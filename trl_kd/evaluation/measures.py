"""What each measure is called, what it counts in, and which way is better."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    r"""
    How to speak of a measure.

    Args:
        title (`str`):
            Name in tables.
        unit (`str`):
            What it counts in, empty for a share.
        higher_is_better (`bool`, *optional*):
            Which way is better; `None` where that depends.
        description (`str`):
            One sentence on what it is.
        needs_teacher (`str`, *optional*, defaults to `""`):
            `"any"` if a teacher is needed, `"same"` if it must have the model's vocabulary.
        digits (`int`, *optional*, defaults to `3`):
            Decimals that are shown.
    """

    title: str
    unit: str
    higher_is_better: bool | None
    description: str
    needs_teacher: str = ""
    digits: int = 3


_OWN = "on completions that the model itself wrote"
_DATA = "on the references"

TEXT_MEASURES = {
    "rouge_l": Measure(
        "Rouge-L", "of 100", True, "longest common subsequence with the nearest reference, F-measure", digits=2
    ),
    "exact_match": Measure("exact match", "%", True, "share of completions whose answer is the reference's", digits=1),
    "chrf": Measure("chrF", "of 100", True, "character n-grams shared with the nearest reference", digits=2),
    "distinct_1": Measure("distinct-1", "", None, "share of different words among all words written"),
    "distinct_2": Measure("distinct-2", "", None, "share of different pairs of words among all pairs written"),
    "distinct_3": Measure("distinct-3", "", None, "share of different triples of words among all triples written"),
    "distinct_4": Measure("distinct-4", "", None, "share of different runs of four words among all that were written"),
    "length": Measure("length", "tokens", None, "length of a completion, its end included", digits=1),
    "eos_share": Measure("ends", "%", None, "share of completions that end by themselves", digits=1),
}
"""Measures of the texts that a model writes."""

LIKELIHOOD_MEASURES = {
    "nll": Measure("NLL", "nats/token", False, f"negative log-likelihood {_DATA}, in the model's own tokens"),
    "bits_per_byte": Measure("bits per byte", "bits", False, f"negative log-likelihood {_DATA}, per byte of text"),
}
"""Measures of how likely a model finds the references."""

TEACHER_MEASURES = {
    "forward_kl": Measure("FKL, data", "nats/token", False, f"KL(teacher || model) {_DATA}", needs_teacher="same"),
    "reverse_kl": Measure("RKL, data", "nats/token", False, f"KL(model || teacher) {_DATA}", needs_teacher="same"),
    "total_variation": Measure(
        "TV, data", "", False, f"total variation between model and teacher {_DATA}", needs_teacher="same"
    ),
    "own_forward_kl": Measure(
        "FKL, own text", "nats/token", False, f"KL(teacher || model) {_OWN}", needs_teacher="same"
    ),
    "own_reverse_kl": Measure(
        "RKL, own text", "nats/token", False, f"KL(model || teacher) {_OWN}", needs_teacher="same"
    ),
    "own_total_variation": Measure(
        "TV, own text", "", False, f"total variation between model and teacher {_OWN}", needs_teacher="same"
    ),
    "own_entropy": Measure("entropy", "nats/token", None, f"entropy of the model {_OWN}", needs_teacher="same"),
    "imitation_gap": Measure(
        "imitation gap",
        "nats/token",
        False,
        "log-likelihood under the teacher of what the teacher writes, minus that of what the model writes",
        needs_teacher="any",
    ),
}
"""Measures of the distance to a teacher."""

MEASURES = TEXT_MEASURES | LIKELIHOOD_MEASURES | TEACHER_MEASURES
"""All measures that ship with the package, by name."""


def measure_of(name: str) -> Measure:
    """The measure of this name; of a metric of the user's own, nobody knows which way is better."""
    return MEASURES.get(name, Measure(name, "", None, "a metric of your own"))
