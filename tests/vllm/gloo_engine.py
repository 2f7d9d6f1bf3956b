"""vLLM's NCCL weight transfer with gloo in NCCL's place, for servers on CPUs.

All but the broadcast is vLLM's own on both sides: its endpoints, its worker and trainer engines,
what they tell each other. A worker knows the backend by importing this module, which
--worker-extension-cls has it do.
"""

from __future__ import annotations

import torch
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "gloo"


def _meet(info, rank: int):
    return stateless_init_torch_distributed_process_group(
        info.master_address, info.master_port, rank, info.world_size, "gloo"
    )


class GlooWorkerEngine(nccl_engine.NCCLWeightTransferEngine):
    def init_transfer_engine(self, init_info) -> None:
        config = self.parallel_config
        worker = config.data_parallel_index * config.world_size + config.rank
        self.model_update_group = _meet(init_info, worker + init_info.rank_offset)

    def update_weights(self, update_info) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info) -> None:
        told = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        for name, dtype, shape in told:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.model_update_group.broadcast(tensor, 0).wait()
            self.model.load_weights([(name, tensor)])

    def shutdown(self) -> None:
        self.model_update_group = None


class GlooTrainerEngine(nccl_engine.NCCLTrainerWeightTransferEngine):
    def _broadcast(self, source, meta) -> None:
        for _, tensor in self._checked_iter(source, meta):
            self.model_update_group.broadcast(tensor.contiguous(), 0).wait()

    def shutdown(self) -> None:
        self.model_update_group = None


class Extension:
    """What --worker-extension-cls names."""


def open_gloo(address: str, port: int, group, weights) -> GlooTrainerEngine:
    """As `weight_transfer.open_nccl`."""
    nccl_engine.open_trainer_endpoint = lambda info: _meet(info, 0)
    info = nccl_engine.NCCLTrainerInitInfo(address, port, group.world_size, rank=0, packed=False)
    return GlooTrainerEngine.trainer_init(info, client=group, source=weights)


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, GlooWorkerEngine)
