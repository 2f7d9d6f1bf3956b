"""TRL 1.16's SDPO and SDFT trainers without [B, T, V] logits: what TRL aligns, masks and hands to
its loss as logits are hidden states here, and the loss is the fused loss head's."""
# pyright: reportAttributeAccessIssue=false

import torch
from trl.models.utils import _ForwardRedirection

from .completions import completion_logprobs, completion_loss
from .hidden_states import head_weight, hidden_states

_ONLY = {"distillation_weight": 1, "use_teacher_server": False, "torch_compile": False, "n_gpu": 1,
         "is_fsdp_enabled": False, "is_deepspeed_enabled": False}  # fmt: skip


class FusedLossHead:
    """`class Fused(FusedLossHead, SDPOTrainer): pass`; ValueError for what it cannot honour."""

    loss_head_impl = "auto"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        found = {**vars(self), **vars(self.args), "n_gpu": max(1, self.args.n_gpu)}
        for name, only in _ONLY.items():
            if found.get(name, only) != only:
                raise ValueError(f"{name}: {only!r} or no FusedLossHead, got {found[name]!r}")

    def compute_loss(self, model, inputs, **options):
        inner = self.accelerator.unwrap_model(model)  # in the wrapper's forward: DDP sees the head
        return _ForwardRedirection()(model, inner, super().compute_loss, inner, inputs, **options)

    def _forward_logits(self, model, input_ids, attention_mask, logits_to_keep):
        return hidden_states(model, input_ids, attention_mask)[:, -logits_to_keep - 1 : -1]

    def _compute_rollout_logps(self, prompt_ids, prompt_mask, completion_ids, completion_mask):
        every = self.args.steps_per_generation * self.num_iterations
        if self.args.gradient_accumulation_steps % every == 0:
            return None
        ids = torch.cat([prompt_ids, completion_ids], 1)
        mask = torch.cat([prompt_mask, completion_mask], 1)
        with torch.no_grad(), self.accelerator.autocast():
            hidden = self._forward_logits(self.model, ids, mask, completion_ids.shape[1])
            rows = hidden, head_weight(self.model), completion_ids, completion_mask
            return completion_logprobs(*rows, self.temperature, self.loss_head_impl)

    def _compute_self_distillation_loss(self, model, inputs, found):
        a, mode, top_k = self.args, self.args.distillation_mode, self.args.distillation_topk
        if mode == "topk_logits" and top_k is None:
            raise ValueError("distillation_topk: distillation_mode='topk_logits' needs a number")
        with self.accelerator.autocast():
            loss, mean = completion_loss(
                found.student_logits, head_weight(model), found.completion_ids, found.loss_mask,
                self.temperature, self.loss_head_impl, teacher_BTD=found.teacher_logits,
                teacher_head_VD=head_weight(self.teacher_model), is_clip=a.distillation_is_clip,
                old_logprob_BT=inputs.get("old_per_token_logps"), beta=a.distillation_alpha,
                divergence=mode if mode == "sampled_token" else "jsd", tail=a.distillation_add_tail,
                top_k=top_k if mode == "topk_logits" else None,
            )  # fmt: skip
        where, mean = "train" if model.training else "eval", self.accelerator.gather(mean).mean()
        self._log_self_distillation_metric(where, mean.item())
        return loss
