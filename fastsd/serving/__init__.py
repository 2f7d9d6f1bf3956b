"""Processes that serve a model: spoken to, drawn from, given the policy's weights.

In: requests, and weights of any policy. Out: text or tokens. `endpoint` speaks to any OpenAI-like
server and `cache` keeps its replies; `server`, `fleet` and `draw` are vLLM's; `weights` (by shared
files), `nccl` and `nccl_group` carry weights to it.
"""
