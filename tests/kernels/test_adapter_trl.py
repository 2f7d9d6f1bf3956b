"""The TRL adapter trains as TRL's own trainers do: same losses, metrics and weights.

In fp64, where the only difference left is the order of sums, every option agrees to 1e-9: rounding
of 1e-16 grows by at most lr / eps = 1e5 where Adam divides a gradient by its own size. In fp32 the
promise is 1e-5 after three optimizer steps. Models are random; nothing is downloaded.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd_kernels import fused_linear_loss
from fastsd_kernels.testing import FP32_ERROR, relative_error

VOCABULARY = 60
FULL = {"distillation_mode": "full_logits"}
TOP_K = {"distillation_mode": "topk_logits", "distillation_topk": 7}
NO_TEACHER = {"include_environment_feedback": False, "use_successful_as_teacher": False}
# num_iterations=2 takes a second step on the same rollouts, so old log-probs are in play.
OFF_POLICY = {"num_iterations": 2, "learning_rate": 3e-2}


@pytest.fixture(scope="module")
def trl():
    """Not at collection, which every run of any test pays for."""
    return import_module("trl_training")


@pytest.fixture(scope="module")
def folder(trl, tmp_path_factory):
    return trl.save_model(tmp_path_factory.mktemp("tied"), VOCABULARY, hidden=16, layers=2)


@pytest.fixture(scope="module")
def untied(trl, tmp_path_factory):
    return trl.save_model(
        tmp_path_factory.mktemp("untied"), VOCABULARY, hidden=16, layers=2, tied=False
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {**FULL, "distillation_alpha": 0.0},
        {**FULL, "distillation_alpha": 1.0, "temperature": 0.7},
        {**FULL, "distillation_alpha": 0.3, "gradient_accumulation_steps": 2},
        {**TOP_K, "distillation_alpha": 1.0, "distillation_add_tail": True},
        {**TOP_K, "distillation_alpha": 0.5, "mask_truncated_completions": True},
        {**OFF_POLICY, "distillation_is_clip": 1.0},
        {**OFF_POLICY, **FULL, "temperature": 1.3},
        {**OFF_POLICY, **FULL, "distillation_is_clip": None},
        {**FULL, "teacher_model_kind": "live", "gradient_checkpointing": True},
        {**FULL, "teacher_model_kind": "base"},
        {**NO_TEACHER},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "defaults",
)
def test_sdpo_trains_the_same(options, trl, folder):
    trl.check_same_training(trl.SDPOTrainer, folder, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {**FULL, "num_loss_tokens_to_skip": 3}, {**OFF_POLICY, "distillation_add_tail": True}],
    ids=["defaults", "full", "off policy"],
)
def test_sdft_trains_the_same(options, trl, folder):
    trl.check_same_training(trl.SDFTTrainer, folder, **{"distillation_topk": 7, **options})


def test_untied_head_and_evaluation(trl, untied):
    key = "eval_self_distillation/distillation_loss"
    found = []
    for trainer in trl.check_same_training(trl.SDPOTrainer, untied, **FULL):
        loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]
        found.append([loss, trainer.state.log_history[-1][key]])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("teacher", ["base", "ema", "live"])
def test_lora_trains_the_same(teacher, trl, folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def with_lora():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    runs = []
    for trainer in (trl.fused(trl.SDPOTrainer), trl.SDPOTrainer):
        options = {**FULL, "teacher_model_kind": teacher, "learning_rate": 3e-2}
        runs.append(trl.train(trl.build(trainer, folder, model=with_lora(), **options)))
    assert runs[0]["losses"] == pytest.approx(runs[1]["losses"], rel=1e-9)
    trained = {n: w for n, w in runs[1]["weights"].items() if w.norm() > 0}
    assert trl.disagreement(runs[0], {**runs[1], "weights": trained})[1] <= 1e-9


@pytest.mark.parametrize(
    "trainer, options",
    [
        ("SDPOTrainer", {}),
        ("SDPOTrainer", {**FULL, "distillation_alpha": 0.5}),
        ("SDFTTrainer", FULL),
    ],
    ids=["SDPO defaults", "SDPO JSD", "SDFT JSD"],
)
def test_three_steps_in_fp32(trainer, options, trl, tmp_path):
    """The promise: same loss and weights to 1e-5, with the time and the peak memory of both.

    Top-k is left to fp64 above: in fp32 two entries may tie to rounding, and either is right.
    """
    folder = trl.save_model(tmp_path, 4000, hidden=32, layers=1)
    row = trl.compare(
        getattr(trl, trainer), folder, rows=trl.ROWS, completion=48, max_steps=3, **options
    )
    print(trl.line(f"{trainer} {options}", row))
    assert max(row["loss_difference"], row["weight_difference"]) <= 1e-5
    assert min(row["trl_cpu_s"], row["fused_cpu_s"]) > 0


class _Shapes(TorchDispatchMode):
    """Whether any operator returned a [B, T, V] tensor."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.found = vocabulary, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[2] == self.vocabulary:
                self.found = True
        return result


@pytest.mark.parametrize("with_adapter", [False, True])
def test_no_logits_of_any_model(with_adapter, trl, folder):
    trainer = trl.fused(trl.SDPOTrainer) if with_adapter else trl.SDPOTrainer
    with _Shapes(VOCABULARY) as shapes:
        trl.build(trainer, folder, max_steps=2, **OFF_POLICY, **FULL).train()
    assert shapes.found != with_adapter


def test_bf16_autocast_reaches_the_loss_head(trl, folder, monkeypatch):
    """Operands in bf16, logits in fp32: exact to fp32 rounding for the bf16 operands."""
    seen = []

    def recorded(student, head, ids, mask, *args, **kwargs):
        assert torch.is_autocast_enabled("cpu")
        loss, mean = completion_loss(student, head, ids, mask, *args, **kwargs)
        operands = student, head, kwargs["teacher_BTD"], kwargs["teacher_head_VD"]
        operands = [x.detach().bfloat16().double() for x in operands]
        seen.append((operands, ids, mask, loss.item()))
        return loss, mean

    completion_loss = trl.adapter.completion_loss
    monkeypatch.setattr(trl.adapter, "completion_loss", recorded)
    trl.build(trl.fused(trl.SDPOTrainer), folder, max_steps=1, bf16=True, **FULL).train()
    (student, head, teacher, teacher_head), ids, mask, loss = seen[0]
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    exact = fused_linear_loss(
        student.flatten(0, 1), head, ids.flatten(), teacher_TD=teacher.flatten(0, 1),
        teacher_head_VD=teacher_head, divergence_weight_T=weight.flatten(),
        divergence="reverse_kl", impl="reference",
    )  # fmt: skip
    assert abs(loss - exact.loss.item()) <= FP32_ERROR * abs(exact.loss.item())


def _first(future):
    return future.value()[0]


def test_distributed_data_parallel_sees_an_untied_head(trl, untied):
    """find_unused_parameters, Trainer's default, fails on a parameter used outside the forward."""
    trainer = trl.build(trl.fused(trl.SDPOTrainer), untied, teacher_model_kind="live", **FULL)
    batch = trainer._prepare_inputs([trainer.train_dataset[i] for i in range(trl.ROWS)])
    trainer.compute_loss(trainer.model, batch).backward()
    expected = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(trainer.model, find_unused_parameters=True)
        reduced: list[int] = []

        def reduce(state, bucket):
            reduced.append(bucket.buffer().numel())
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(_first)

        model.register_comm_hook(None, reduce)
        for _ in range(2):  # the second time the reducer has rebuilt its buckets
            trainer.model.zero_grad()
            trainer.compute_loss(model, batch).backward()
    finally:
        dist.destroy_process_group()
    assert sum(reduced) == 2 * sum(p.numel() for p in trainer.model.parameters())
    for p, gradient in zip(trainer.model.parameters(), expected, strict=True):
        assert relative_error(p.grad, gradient) <= FP32_ERROR


class _Stub:
    """What FusedLossHead looks at when it is built, all of it honoured."""

    def __init__(self, **found):
        self.use_teacher_server = self.is_fsdp_enabled = self.is_deepspeed_enabled = False
        self.args = SimpleNamespace(distillation_weight=1.0, torch_compile=False, n_gpu=0)
        for name, value in found.items():
            setattr(self.args if hasattr(self.args, name) else self, name, value)


@pytest.mark.parametrize(
    "setting, value",
    [("distillation_weight", 0.5), ("distillation_weight", 0.0), ("use_teacher_server", True),
     ("torch_compile", True), ("n_gpu", 2), ("is_fsdp_enabled", True),
     ("is_deepspeed_enabled", True)],
)  # fmt: skip
def test_settings_it_cannot_honour_are_refused_by_name(setting, value, trl):
    kind = type("Fused", (trl.adapter.FusedLossHead, _Stub), {})
    kind()
    with pytest.raises(ValueError, match=f"{setting}: .* no FusedLossHead, got {value!r}"):
        kind(**{setting: value})


def test_refusals_of_the_real_trainer(trl, folder):
    with pytest.raises(ValueError, match="distillation_weight: .* got 0.5"):
        trl.build(trl.fused(trl.SDPOTrainer), folder, distillation_weight=0.5)
    with pytest.raises(ValueError, match="distillation_topk"):
        trl.build(trl.fused(trl.SDPOTrainer), folder, distillation_mode="topk_logits").train()
    with pytest.raises(ValueError, match="top_k: .*got 61"):
        trl.build(
            trl.fused(trl.SDPOTrainer), folder, **{**TOP_K, "distillation_topk": VOCABULARY + 1}
        ).train()
    with pytest.raises(ValueError, match="impl: .*no_such"):
        trainer = trl.build(trl.fused(trl.SDPOTrainer), folder)
        trainer.loss_head_impl = "no_such"
        trainer.train()
