"""FSDP2 over CPU processes.

accelerate shards only over what it takes for accelerators, so here it is told that the CPUs are some. Nothing else is
pretended: its own plugin, set by the variables that `accelerate launch` sets, wraps the model.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState

LAUNCHED = {  # by `accelerate launch --use_fsdp --fsdp_version 2`
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "ACCELERATE_TORCH_DEVICE": "cpu",
}


def shard_over_cpus(rank: int, world: int, port: int, backend: str = "gloo") -> None:
    """Makes this process one of so many, whose collectives are gloo's, or those of another kind of it."""
    torch.set_num_threads(1)
    os.environ.update(LAUNCHED, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group(backend)
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
