"""What stands for vLLM, which needs a GPU: behind TRL's engine, or in the engine's place."""

from types import SimpleNamespace
from typing import Any

import torch
import trl.import_utils as import_utils
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation


@torch.no_grad()
def continue_prompt(model: Any, prompt: list[int], params: Any) -> list[int]:
    """Tokens up to and with the first stop token, one by one, greedily or from torch's global generator."""
    ids = list(prompt)
    while len(ids) - len(prompt) < params.max_tokens:
        logits = model(torch.tensor([ids])).logits[0, -1]
        if params.temperature == 0:
            ids.append(logits.argmax().item())
        else:
            ids.append(torch.multinomial((logits / params.temperature).softmax(-1), 1).item())
        if ids[-1] in params.stop_token_ids:
            break
    return ids[len(prompt) :]


class StandInLLM:
    """`vllm.LLM` of one process: loads a folder, takes weights by name, forgets them in its sleep."""

    def __init__(self, model: str, enable_sleep_mode: bool, seed: int, **options: Any):
        torch.manual_seed(seed)  # as vLLM does
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.written, self.seeds = [], []
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)

    @torch.no_grad()
    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, value in weights:
            own[name].copy_(value)

    def generate(self, prompts: list[dict], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        assert prompts, "vLLM got no prompts"
        self.seeds.append(torch.initial_seed())
        outputs = []
        for prompt in prompts:
            ids = continue_prompt(self.model, prompt["prompt_token_ids"], sampling_params)
            self.written.append(ids)
            output = SimpleNamespace(token_ids=tuple(ids), logprobs=None)
            outputs.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[output]))
        return outputs

    def reset_prefix_cache(self) -> None:
        pass

    def wake_up(self, tags: list[str]) -> None:
        pass

    @torch.no_grad()
    def sleep(self, level: int) -> None:
        for parameter in self.model.parameters():
            parameter.fill_(float("nan"))


class StandInClient(StandInLLM):
    """TRL's client of a server, and the server with a model of the shape that `path` holds."""

    path = ""

    def __init__(self, **options: Any):
        super().__init__(self.path, False, 0)

    def init_communicator(self, device: Any) -> None:
        pass

    def update_named_params(self, metadata: list[tuple], named_params: Any) -> None:
        for named in named_params:  # one by one, as they are broadcast: an adapter is merged only meanwhile
            self.load_weights([named])

    def generate(self, prompts: list[list[int]], generation_kwargs: dict, **params: Any) -> dict[str, Any]:
        params = SimpleNamespace(**(params | generation_kwargs))
        outputs = super().generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        ids = [list(output.outputs[0].token_ids) for output in outputs]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": None, "logprob_token_ids": None}


def install(setattr: Any, path: str) -> None:
    """Put the stand-ins behind TRL's engine; `path` holds the student."""
    for module in (import_utils, vllm_generation):
        setattr(module, "is_vllm_available", lambda: True)
    setattr(vllm_generation, "LLM", StandInLLM, raising=False)
    setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    setattr(vllm_generation, "VLLMClient", type("Client", (StandInClient,), {"path": path}))
