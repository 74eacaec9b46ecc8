"""
A reader of what was pushed, with transformers and peft alone: `python tests/hub/plain.py FOLDER NAME ADAPTER`.
It leaves what it found in `FOLDER/plain.json`.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer


def digest(model):
    total = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        total.update(name.encode() + weight.contiguous().numpy().tobytes())
    return total.hexdigest()


def refused(name, folder):
    """How a reader without a token is turned away, by the client and by transformers."""
    try:
        HfApi(token=False).model_info(name)
    except RepositoryNotFoundError as error:
        client = error.response.status_code
    else:
        client = 200
    try:
        AutoModelForCausalLM.from_pretrained(name, token=False, cache_dir=folder / "nobody")
    except OSError as error:
        return client, str(error)
    return client, ""


def main(folder, name, adapter):
    torch.set_num_threads(1)
    expected = json.loads((folder / "train.json").read_text())
    found = {"refused": refused(name, folder), "tags": HfApi().model_info(name).tags}
    tokenizer = AutoTokenizer.from_pretrained(name)
    model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    found["keys"] = sorted([*info["missing_keys"], *info["unexpected_keys"]])
    found["weights"] = digest(model)
    prompt = tokenizer("The sky is", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    found["new_tokens"] = written.shape[1] - prompt["input_ids"].shape[1]
    # Peft alone is asked for the base, which is on the Hub too
    adapted = AutoModelForCausalLM.from_pretrained(adapter).eval()
    with torch.no_grad():
        logits = adapted(torch.tensor(expected["tokens"])).logits
    found["distance"] = (logits - torch.tensor(expected["logits"])).abs().max().item()
    found["adapters"] = sum("lora_B" in key for key in adapted.state_dict())
    found["ours"] = sorted(key for key in sys.modules if key.partition(".")[0] in ("trl", "trl_kd"))
    (folder / "plain.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
