"""The definition of the loss head: materialised logits, plain autograd, any floating dtype.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature     l = log_softmax(z)
    loss = sum_t [ w_div D_t + P_t - w_ent H_t ]

S is the student, T the teacher (a constant). With top_k a divergence compares the student's k
likeliest entries, renormalised or with the rest as one bucket.
Shape suffixes: T rows, D hidden size, V vocabulary, K buckets of a divergence.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from .contract import (
    LOG_RATIO_LIMIT,
    Evaluation,
    Inputs,
    Options,
    RowStatistics,
    statistics_dtype,
)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: it runs on any device, with any floating point dtype."""
    return None


def evaluate(inputs: Inputs, options: Options, wanted: tuple[bool, bool, bool]) -> Evaluation:
    """The definition's value and, by autograd, its gradients."""
    names = ("student_TD", "head_VD", "bias_V")
    leaves = {
        name: getattr(inputs, name).detach().requires_grad_()
        for name, want in zip(names, wanted, strict=True)
        if want
    }
    with _recording(bool(leaves)):
        total, found = loss(replace(inputs, **leaves), options)
        gradients = torch.autograd.grad(total, list(leaves.values())) if leaves else ()
    by_name = dict(zip(leaves, gradients, strict=True))
    d_student_TD, d_head_VD, d_bias_V = (by_name.get(name) for name in names)
    return Evaluation(total.detach(), found, (d_student_TD, d_head_VD, d_bias_V))


@contextmanager
def _recording(enabled: bool):
    """Autograd inside a custom op, which the dispatcher runs with autograd's keys excluded."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    if enabled:
        excluded = excluded.remove(torch._C.DispatchKey.AutogradFunctionality)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.set_grad_enabled(enabled):
        yield


def loss(inputs: Inputs, options: Options) -> tuple[Tensor, RowStatistics]:
    """The definition, differentiable as often as one likes."""
    l_s_TV = _log_probs(inputs.student_TD, inputs.head_VD, inputs.bias_V, options)
    logprob_T = l_s_TV.gather(1, inputs.target_T[:, None])[:, 0]
    entropy_T = -(l_s_TV.exp() * l_s_TV).sum(-1)
    terms, found = [], {"student_logprob_T": logprob_T, "entropy_T": entropy_T}
    if inputs.teacher_TD is not None:
        with torch.no_grad():
            head_VD = inputs.head_VD if inputs.teacher_head_VD is None else inputs.teacher_head_VD
            l_t_TV = _log_probs(inputs.teacher_TD, head_VD, inputs.bias_V, options)
        found["teacher_logprob_T"] = l_t_TV.gather(1, inputs.target_T[:, None])[:, 0]
        if options.divergence == "sampled_token":
            divergence_T = logprob_T - found["teacher_logprob_T"]
            surrogate_T = divergence_T.detach() * logprob_T
        else:
            entries_TK = _entries(*_buckets(l_s_TV, l_t_TV, options), options)
            if options.entry_clip is not None:
                found["entry_clipped_T"] = (entries_TK > options.entry_clip).sum(-1)
                entries_TK = entries_TK.clamp(max=options.entry_clip)
            surrogate_T = divergence_T = entries_TK.sum(-1)
        found["divergence_T"] = divergence_T
        if inputs.divergence_weight_T is not None:
            terms.append(inputs.divergence_weight_T * surrogate_T)
    if inputs.policy_weight_T is not None:
        args = inputs.policy_weight_T, inputs.old_logprob_T, options.clip
        policy_T, clipped = _policy(logprob_T, *args)
        terms.append(policy_T)
        found |= clipped
    if inputs.entropy_weight_T is not None:
        terms.append(-inputs.entropy_weight_T * entropy_T)
    total = sum(terms, torch.zeros_like(logprob_T)).sum()
    return total, RowStatistics(**{name: value.detach() for name, value in found.items()})


def statistics(inputs: Inputs, options: Options) -> RowStatistics:
    """The definition's statistics, without a graph."""
    with torch.no_grad():
        return loss(inputs, options)[1]


def _log_probs(hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None, o: Options) -> Tensor:
    dtype = statistics_dtype(hidden_TD)
    bias_V = None if bias_V is None else bias_V.to(dtype)
    z_TV = linear(hidden_TD.to(dtype), head_VD.to(dtype), bias_V) * o.logit_scale
    z_TV = z_TV if o.softcap is None else o.softcap * torch.tanh(z_TV / o.softcap)
    return torch.log_softmax(z_TV / o.temperature, -1)


def _buckets(l_s_TV: Tensor, l_t_TV: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both sides over the buckets that the divergence compares."""
    if options.top_k is None:
        return l_s_TV, l_t_TV
    index_TK = l_s_TV.detach().topk(options.top_k, -1).indices
    picked = l_s_TV.gather(1, index_TK), l_t_TV.gather(1, index_TK)
    if not options.tail:
        return picked[0].log_softmax(-1), picked[1].log_softmax(-1)
    # log(-expm1(logsumexp(picked))), summed from the other side: no cancellation near zero.
    rest = [x.scatter(1, index_TK, -torch.inf).logsumexp(-1, True) for x in (l_s_TV, l_t_TV)]
    return torch.cat([picked[0], rest[0]], -1), torch.cat([picked[1], rest[1]], -1)


def _entries(l_s_TK: Tensor, l_t_TK: Tensor, options: Options) -> Tensor:
    if options.divergence == "forward_kl":
        return l_t_TK.exp() * (l_t_TK - l_s_TK)
    if options.divergence == "reverse_kl":
        return l_s_TK.exp() * (l_s_TK - l_t_TK)
    beta = options.beta
    l_m_TK = torch.logaddexp(l_s_TK + math.log1p(-beta), l_t_TK + math.log(beta))
    towards_t, towards_s = (x.exp() * (x - l_m_TK) for x in (l_t_TK, l_s_TK))
    return beta * towards_t + (1 - beta) * towards_s


def _policy(logprob_T: Tensor, weight_T: Tensor, old_T: Tensor | None, clip: float | None):
    if old_T is None:
        return -weight_T * logprob_T, {}
    log_ratio_T = (logprob_T - old_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    plain_T = log_ratio_T.exp() * weight_T
    if clip is None:
        return -plain_T, {}
    limited_T = log_ratio_T.exp().clamp(1 - clip, 1 + clip) * weight_T
    return -torch.minimum(plain_T, limited_T), {"policy_clipped_T": limited_T < plain_T}
