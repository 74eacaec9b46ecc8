"""Comparisons and samples to report on: a usual one, and one where all text is hostile."""

import random
from pathlib import Path

import trl_kd.evaluation
from trl_kd.evaluation.bootstrap import Estimate
from trl_kd.evaluation.comparison import Change, ComparedModel, Comparison
from trl_kd.evaluation.store import Sample


FOLDER = Path(trl_kd.evaluation.__file__).parent
"""Where the template, the script and the style are."""

HOSTILE = [
    "<script>window.hacked=1</script>",
    "</script><img src=x onerror=window.hacked=1>",
    "<!--<script>",
    "]]></style></title></textarea><svg onload=window.hacked=1>",
    "\u2028window.hacked=1\u2029{{ 7 * 7 }}{% raw %}&lt;b&gt;",
    '" onmouseover="window.hacked=1" x="',
]
"""Texts that would be markup or script if a page were careless."""

METRICS = ["rouge_l", "bits_per_byte", "own_total_variation", "imitation_gap", "length", "eos_share"]

# Values of teacher, before and after
_VALUES = {
    "rouge_l": (31.42, 22.87, 28.14, 1.3),
    "bits_per_byte": (0.812, 1.147, 0.934, 0.021),
    "own_total_variation": (0.0, 0.412, 0.187, 0.011),
    "imitation_gap": (0.0, 1.312, 0.334, 0.09),
    "length": (31.8, 37.9, 32.4, 1.4),
    "eos_share": (99.6, 87.5, 99.0, 2.1),
}
_UP = {"rouge_l": True, "length": None, "eos_share": None}

_WORDS = "Mia has two red apples . Ben finds three more under the bridge , now she is happy and goes home".split()


def estimate(value: float, half: float) -> Estimate:
    return Estimate(value, value - half, value + half, half / 2)


def change(metric: str, against: str, left: float, right: float, half: float) -> Change:
    value = left - right
    up = _UP.get(metric, False)
    if abs(value) <= half:
        verdict = "not distinguishable at 95 %"
    elif up is None:
        verdict = "higher" if value > 0 else "lower"
    else:
        verdict = "better" if (value > 0) == up else "worse"
    return Change(metric, against, estimate(value, half), value / right if right else None, verdict)


def training_log(steps: int = 60, seed: int = 0) -> list[dict]:
    """A log with the keys of AMM with learned critics, and two of SparseTD's."""
    rng = random.Random(seed)
    log = []
    for step in range(1, steps + 1):
        left = 2.0 ** (-step / 20)
        entry = {"step": step * 5, "epoch": step / 30, "loss": 0.4 + left + rng.gauss(0, 0.03)}
        for source, shift in (("off_policy", 0.0), ("on_policy", 0.08)):
            kd = f"kd/{source}"
            entry[f"{kd}/moment"] = 0.3 + 0.9 * left + shift + rng.gauss(0, 0.03)
            entry[f"{kd}/tightness"] = 0.75 - 0.1 * left - shift + rng.gauss(0, 0.02)
            entry[f"{kd}/saturation"] = 0.8 + rng.gauss(0, 0.01)
            entry[f"{kd}/total_variation"] = 0.18 + 0.3 * left + shift + rng.gauss(0, 0.01)
            entry[f"{kd}/top1_agreement"] = 0.8 - 0.3 * left - shift + rng.gauss(0, 0.01)
            entry[f"{kd}/student_entropy"] = 1.2 + left + rng.gauss(0, 0.02)
            entry[f"{kd}/teacher_entropy"] = 1.2 + rng.gauss(0, 0.02)
            entry[f"{kd}/set_size"] = 14 + 4 * left + rng.gauss(0, 0.5)
            entry[f"{kd}/tokens"] = 512.0
        entry["kd/set_size_max"] = 60 + rng.randrange(12)
        entry["grad_norm"], entry["learning_rate"] = 1 + left, 3e-3 * (1 - step / steps)
        log.append(entry)
        if step % 12 == 0:
            log.append({"step": step * 5, "eval_loss": 0.2 + 0.3 * left, "eval_runtime": 1.0})
    log.append({"step": steps * 5, "train_loss": 0.6, "train_runtime": 61.0})
    return log


def cost(parameters: int, speed: float) -> dict:
    batches = {
        size: {"tokens_per_second": speed * factor, "p50_seconds": 64 / speed, "p95_seconds": 70 / speed}
        for size, factor in (("1", 1), ("8", 5.2))
    }
    return {
        "parameters": parameters,
        "bytes_on_disk": parameters * 4 + 3000,
        "load_seconds": 0.031 + parameters / 1e7,
        "peak_memory_bytes": 310_000_000 + parameters * 9,
        "device": "cpu",
        "device_name": "a processor",
        "threads": 2,
        "dtype": "float32",
        "prompt_length": 64,
        "new_tokens": 64,
        "first_token_seconds": {"p50": 4 / speed, "p95": 6 / speed},
        "batches": batches,
        "price_per_million_tokens": {"1": 100 / speed, "8": 20 / speed},
    }


def model(name: str, role: str, place: int, **changes) -> ComparedModel:
    """Model number `place` of the usual values: 0 teacher, 1 before, 2 after."""
    estimates = {metric: estimate(found[place], found[3]) for metric, found in _VALUES.items()}
    built = ComparedModel(name, role, f"models/{name}", 0, 0, "9f2c41d0a7b3", estimates)
    speed = (810.0, 2900.0, 2950.0)[place]
    built.parameters = (1_860_000, 420_000, 420_000)[place]
    built.cost = cost(built.parameters, speed)
    built.size_on_disk = built.cost["bytes_on_disk"]
    if place:
        built.to_teacher = {m: change(m, "teacher", v[place], v[0], v[3]) for m, v in _VALUES.items()}
        curve = [(0.05 + 0.25 * place % 0.3) * (1 + index / 30) for index in range(48)]
        built.by_position = {"total_variation": curve, "count": [96 - 2 * index for index in range(48)]}
    if place == 2:
        built.changes = {m: change(m, "before", v[2], v[1], v[3]) for m, v in _VALUES.items()}
        built.training = training_log()
    for key, value in changes.items():
        setattr(built, key, value)
    return built


def usual(num_prompts: int = 12) -> Comparison:
    """Teacher, the student before, and the student after."""
    models = [model("teacher", "teacher", 0), model("before", "before", 1), model("amm", "student", 2)]
    return Comparison(
        run_id=3,
        title="AMM on stories",
        dataset="stories",
        created="2026-11-23T07:26:38+00:00",
        settings={"name": "story", "temperature": 1.0, "seeds": [0, 1, 2], "top_p": 1.0, "prompt": "{{ prompt }}"},
        versions={"trl_kd": "0.1.0", "trl": "1.16.0", "torch": "2.13.0"},
        metrics=list(METRICS),
        models=models,
        num_prompts=num_prompts,
        seeds=[0, 1, 2],
    )


def sample(index: int, place: int, rng: random.Random, text: list[str] | None = None) -> Sample:
    words = text or [" " + rng.choice(_WORDS) for _ in range(rng.randrange(24, 40))]
    tokens = [*words, "<|endoftext|>"]
    scale = (0.0, 0.45, 0.2)[place]
    divergence = [min(1.0, rng.random() ** 2 * 2.4 * scale) for _ in tokens]
    values = {"rouge_l": (10.0 * place + 5, 1.0), "length": (float(len(tokens)), 1.0), "eos_share": (100.0, 1.0)}
    values |= {"bits_per_byte": (0.9, 90.0), "imitation_gap": (0.3, 20.0)}
    return Sample(
        index=index,
        prompt=f"Story {index}: {_WORDS[index % len(_WORDS)]} has {index} marbles.",
        references=[f" Reference to number {index}."],
        completion="".join(words),
        tokens=tokens,
        divergence=divergence,
        ended=True,
        values=values,
        token_ids=list(range(len(tokens))),
    )


def usual_samples(comparison: Comparison, num_prompts: int = 12) -> dict[str, list[Sample]]:
    rng = random.Random(7)
    places = {"teacher": 0, "before": 1}
    return {
        each.name: [sample(index, places.get(each.role, 2), rng) for index in range(num_prompts)]
        for each in comparison.models
    }


def hostile() -> tuple[Comparison, dict[str, list[Sample]]]:
    """All texts that come from outside are attacks, in each place where one may stand."""
    comparison = usual(len(HOSTILE))
    names = [f"{text} {index}" for index, text in enumerate(HOSTILE[:3])]
    for each, name in zip(comparison.models, names, strict=True):
        each.name, each.source, each.weights = name, HOSTILE[1], HOSTILE[5]
    for each in comparison.models[2].changes.values():
        object.__setattr__(each, "against", names[1])
    comparison.title, comparison.dataset, comparison.created = HOSTILE[0], HOSTILE[1], HOSTILE[2]
    comparison.settings = {text: text for text in HOSTILE}
    comparison.versions = {HOSTILE[3]: HOSTILE[5]}
    rng = random.Random(0)
    samples = {}
    for place, name in enumerate(names):
        samples[name] = []
        for index, text in enumerate(HOSTILE):
            one = sample(index, place, rng, [text, "", " and ", text])
            one.prompt, one.references = f"prompt {index} {text}", [text, text]
            samples[name].append(one)
    return comparison, samples
