"""The trainer of test_transfer.py, with vLLM's own python: transfer_worker.py URL MODEL FOLDER.

Prints what the server's answers to the probe were, as one JSON line, for weights that it got by
transfer, stale ones, renewed ones, and the same by files.
"""

import json
import sys
from pathlib import Path

import torch
from gloo_engine import open_gloo

from fastsd.config.sections import ModelConfig, PromptConfig, RolloutConfig
from fastsd.model import load_policy
from fastsd.prompts.render import PromptRenderer
from fastsd.rollout.vllm import VllmSampler
from fastsd.serving.fleet import ask
from fastsd.serving.nccl import WeightTransfer
from fastsd.serving.weights import SharedFiles

TIMEOUT_S = 240.0


def main(url: str, model: str, folder: Path) -> dict:
    policy = load_policy(ModelConfig(name=model), "cpu", torch.bfloat16)
    config = RolloutConfig(engine="vllm", servers=[url], max_new_tokens=48, timeout_s=TIMEOUT_S)
    renderer = PromptRenderer(policy.tokenizer, PromptConfig(max_prompt_tokens=256))
    sampler = VllmSampler(policy, renderer, config, folder)
    [server] = sampler.fleet.servers
    found: dict = {"name": sampler.name}

    def look(what: str) -> None:
        draw, vocabulary = sampler._probe(), len(policy.head_VD)
        ids, logprobs = ask(lambda client: server.complete(client, draw, vocabulary))[0]
        gap = sampler._gap(ids, logprobs, 1.0)
        found[what] = {"ids": ids, "logprobs": logprobs, "gap": gap}

    found["backend"] = ask(server.transfer_backend)
    sampler.sync = WeightTransfer(policy, TIMEOUT_S, open_gloo)
    sampler.update_weights(0)
    look("base")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    look("stale")
    sampler.update_weights(1)
    found["seconds"] = sampler.metrics()["rollout/sync_s"]
    look("renewed")
    # The group that served the first transfers breaks off here, and the next run meets it anew.
    sampler.sync = WeightTransfer(policy, TIMEOUT_S, open_gloo)
    ask(lambda client: server.transfer(client, "start_weight_update", TIMEOUT_S))
    sampler.update_weights(2)
    look("met anew")
    sampler.sync = SharedFiles(policy, folder)
    sampler.update_weights(3)
    look("by files")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
