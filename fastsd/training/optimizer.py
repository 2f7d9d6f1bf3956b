"""AdamW on fp32 master weights, with the guards that a long run needs.

The step is written so that it either happens whole or not at all. Norms are taken first; only when
every one and the loss are finite, and no spike, do the weights and moments move, so a skipped step
leaves them unchanged bit for bit. Low-precision parameters (bf16, fp16) get an fp32 master: their
gradient is cast to it, some at a time, AdamW moves the master, and the parameter is the master
rounded. fp32 parameters are their own master. `torch.optim.AdamW(fused=True)` does the arithmetic,
in one pass over each tensor.

Where the weights are spread over ranks, each rank moves its own part. Norms and loss are those of
all ranks, added up in one order everywhere, so that all clip, skip and stop alike.

The schedule counts calls of `step`, not applied updates, so that a cosine ends with the run
whatever was skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsd.checkpoint.tensors import copy_into
from fastsd.config.sections import OptimConfig
from fastsd.errors import CheckpointError, FastsdError, TrainingDiverged
from fastsd.runtime.shards import local
from fastsd.runtime.world import ALONE, World
from fastsd.training.schedule import learning_rate

MAX_NONFINITE_IN_A_ROW = 5
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Gradients in fp32 at once, beside those that were summed up in it.
_CAST_BYTES = 64 * 2**20


class Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) over a model's trainable parameters.

    Call `backward(loss)` for each micro-batch, then `step()`. is_spike(gradient norm, loss) says of
    an update that could be applied whether it is to be skipped.
    A matrix shared by two modules (embedding tied to the head) is one parameter under its first
    name. Parameters with one dimension or none (biases, norms) are not decayed.
    Raises FastsdError when the model has nothing to train.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: OptimConfig,
        is_spike: Callable[[float, float | None], bool] = lambda grad_norm, loss: False,
        world: World = ALONE,
    ):
        self.config = config
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise FastsdError(
                "the model has no trainable parameter: model.freeze matches all of them; "
                "remove entries from it"
            )
        self.masters = {
            name: _fp32_copy(p) if p.dtype in _LOW_PRECISION else p
            for name, p in self.parameters.items()
        }
        self._is_spike = is_spike
        self._world = world
        self._loss: Tensor | None = None
        self.calls = 0
        self.nonfinite_steps = 0
        self.nonfinite_in_a_row = 0
        self.empty_steps = 0
        decayed = [m for m in self.masters.values() if m.ndim >= 2]
        plain = [m for m in self.masters.values() if m.ndim < 2]
        groups = [(decayed, config.weight_decay), (plain, 0.0)]
        self._adamw = torch.optim.AdamW(
            [{"params": params, "weight_decay": decay} for params, decay in groups if params],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    @torch.no_grad()
    def step(self) -> dict[str, float]:
        """Clip, move the weights, clear the gradients.

        Returns grad_norm (fp32 norms per tensor, before clipping; inf or nan when the gradient
        is not finite), lr, skipped (1.0 when nothing moved), and guard/nonfinite and guard/spike
        (1.0 when that is why). Nothing moves when a gradient or the loss is not finite (counted in
        `nonfinite_steps`), when is_spike says so, or when no parameter has a gradient other than
        zero, e.g. because all of GRPO's groups agreed (counted in `empty_steps`).
        Raises TrainingDiverged at the fifth non-finite call in a row, which then counts as not
        made: a checkpoint has the state that it found.
        """
        lr = learning_rate(self.config, self.calls)
        if any(master.grad is not None for master in self.masters.values()):
            self.accumulate()  # the last micro-batch's to the others'; a single one stays as it is
        norms, loss = self._over_ranks(self._gradient_norms())
        norm = math.sqrt(math.fsum(n * n for n in norms.values()))
        finite = math.isfinite(norm) and (loss is None or math.isfinite(loss))
        if not finite:
            self._count_nonfinite(norms, loss, lr)
        spike = finite and norm > 0.0 and self._is_spike(norm, loss)
        moved = finite and norm > 0.0 and not spike
        self.calls += 1
        if moved:
            self._apply(lr, norm)
            self.nonfinite_in_a_row = 0
        elif finite and not spike:
            self.empty_steps += 1
        self.zero_grad()
        guards = {"guard/nonfinite": float(not finite), "guard/spike": float(spike)}
        return {"grad_norm": norm, "lr": lr, "skipped": float(not moved), **guards}

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradients, and its loss (a scalar) to the step's."""
        self.accumulate()
        loss.backward()
        value = loss.detach().double()
        self._loss = value if self._loss is None else self._loss + value

    @torch.no_grad()
    def accumulate(self) -> None:
        """Before each `loss.backward()`: adds low-precision gradients to their masters' in fp32.

        Left in bf16, the gradients of later micro-batches would vanish in the sum's rounding.
        """
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def zero_grad(self) -> None:
        """Drop all gradients and the loss."""
        self._loss = None
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.masters[name].grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters and moments by "master/NAME", "exp_avg/NAME", "exp_avg_sq/NAME": live, fp32.

        The masters of fp32 parameters are included, so that these tensors alone restore the
        trainable weights exactly. A parameter that never got a gradient has no moments.
        """
        tensors = {f"master/{name}": m.detach() for name, m in self.masters.items()}
        for name, master in self.masters.items():
            state = self._adamw.state.get(master, {})
            tensors.update({f"{key}/{name}": state[key] for key in _MOMENTS if key in state})
        return tensors

    def state_json(self) -> dict[str, Any]:
        """Schedule position, skip counters and AdamW's step count of each parameter."""
        return {
            "calls": self.calls,
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "empty_steps": self.empty_steps,
            "updates": {
                name: int(self._adamw.state[master]["step"].item())
                for name, master in self.masters.items()
                if master in self._adamw.state
            },
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore what `state_tensors` and `state_json` gave, the model's parameters included.

        Checks everything before it changes anything. Raises CheckpointError naming the tensor
        that is missing, unknown, or of another shape or dtype.
        """
        updates = state["updates"]
        wanted = {f"master/{name}": m for name, m in self.masters.items()}
        for name in updates:
            if name not in self.masters:
                raise CheckpointError(_mismatch(name, "is not a trainable parameter of this model"))
            wanted.update({f"{key}/{name}": self.masters[name] for key in _MOMENTS})
        _check_tensors(wanted, tensors)
        self._adamw.state.clear()
        for name, count in updates.items():
            master = self.masters[name]
            moments = {key: torch.empty_like(master) for key in _MOMENTS}
            step = torch.tensor(float(count), dtype=torch.float32, device=master.device)
            self._adamw.state[master] = {"step": step, **moments}
        copy_into(self.state_tensors(), tensors)
        for name, master in self.masters.items():
            if self.parameters[name] is not master:
                self.parameters[name].copy_(master)
        self.calls = state["calls"]
        self.nonfinite_steps = state["nonfinite_steps"]
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
        self.empty_steps = state["empty_steps"]

    def _gradient(self, name: str) -> Tensor | None:
        """fp32 in the master, or as the only micro-batch left it in the parameter."""
        gradient = self.masters[name].grad
        return self.parameters[name].grad if gradient is None else gradient

    def _gradient_norms(self) -> dict[str, float]:
        """L2 norm of each gradient in fp32, of this rank's part."""
        gradients = {name: self._gradient(name) for name in self.masters}
        norms = {
            name: torch.linalg.vector_norm(local(gradient), dtype=torch.float32)
            for name, gradient in gradients.items()
            if gradient is not None
        }
        if not norms:
            return {}
        # One transfer for all of them: an .item() per tensor would stall a GPU hundreds of times.
        return dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))

    def _over_ranks(self, norms: dict[str, float]) -> tuple[dict[str, float], float | None]:
        """Norms of the whole gradients, and the sum of all ranks' losses."""
        loss = None if self._loss is None else self._loss.item()
        if self._world.size == 1:
            return norms, loss
        found = self._world.gather((norms, loss))
        losses = [part for _, part in found if part is not None]
        names = dict.fromkeys(name for part, _ in found for name in part)
        whole = {name: math.hypot(*(part.get(name, 0.0) for part, _ in found)) for name in names}
        return whole, sum(losses) if losses else None

    def _apply(self, lr: float, norm: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = lr
        scale = min(1.0, self.config.max_grad_norm / norm)
        for names in self._portions():
            for name in names:
                gradient = self._gradient(name)
                assert gradient is not None
                self.parameters[name].grad = None
                wide = gradient.float()  # fp32 as it is
                self.masters[name].grad = wide.mul_(scale) if scale < 1.0 else wide
            self._adamw.step()  # moves the masters that have a gradient now
            for name in names:
                master, parameter = self.masters[name], self.parameters[name]
                master.grad = None
                if master is not parameter:
                    parameter.copy_(master)

    def _portions(self) -> list[list[str]]:
        """Names of the parameters with a gradient: all that is fp32 already, then the others, so
        many that casting theirs takes `_CAST_BYTES` at once."""
        portions = [[name for name, master in self.masters.items() if master.grad is not None]]
        room = 0
        for name, master in self.masters.items():
            if master.grad is not None or self.parameters[name].grad is None:
                continue
            if master.nbytes > room:
                portions.append([])
                room = _CAST_BYTES
            portions[-1].append(name)
            room -= master.nbytes
        return [portion for portion in portions if portion]

    def _count_nonfinite(self, norms: Mapping[str, float], loss: float | None, lr: float) -> None:
        in_a_row = self.nonfinite_in_a_row + 1
        if in_a_row < MAX_NONFINITE_IN_A_ROW:
            self.nonfinite_steps += 1
            self.nonfinite_in_a_row = in_a_row
            return
        self.zero_grad()
        bad = next((name for name, norm in norms.items() if not math.isfinite(norm)), None)
        where = f"the gradient of {bad!r} (norm {norms[bad]})" if bad else f"the loss ({loss})"
        raise TrainingDiverged(
            f"{in_a_row} non-finite updates in a row (update {self.calls + 1}): the first bad "
            f"tensor is {where} at learning rate {lr:g}. The weights are those of the last good "
            "update. Lower optim.lr, or look at metrics.jsonl for what grew before"
        )


def _fp32_copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.float32, copy=True)


def _check_tensors(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, mine in wanted.items():
        if name not in found:
            raise CheckpointError(_mismatch(name, "is missing from the saved optimizer state"))
        have = (tuple(found[name].shape), found[name].dtype)
        want = (tuple(mine.shape), mine.dtype)
        if have != want:
            raise CheckpointError(_mismatch(name, f"is {have}, this model needs {want}"))
    for name in found:
        if name.startswith(("master/", "exp_avg/", "exp_avg_sq/")) and name not in wanted:
            raise CheckpointError(_mismatch(name, "is not part of this model's optimizer"))


def _mismatch(name: str, what: str) -> str:
    return (
        f"optimizer state: {name!r} {what}. Resume with the same model, model.lora and "
        "model.freeze as the run that saved it"
    )
