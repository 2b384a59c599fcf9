"""verl on a machine without an accelerator; its processes import this by VERL_USE_EXTERNAL_MODULES.

Ray's "GPUs" are slots, ranks talk over gloo, rollouts come from transformers' own `generate`, and packed sequences run
without flash-attn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from types import ModuleType
from typing import Any

import bench_torchvision  # noqa: F401  (before transformers)
import torch
import verl.utils.distributed
from verl.plugin.platform import PlatformBase, PlatformRegistry

torch.set_num_threads(1)


class CPUModule(ModuleType):
    """`torch.cpu`, and what verl asks of `torch.cuda` beside it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        answers = {"get_device_name": "CPU", "mem_get_info": (1 << 34, 1 << 35)}
        return getattr(torch.cpu, name, lambda *args, **kwargs: answers.get(name, 0))


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):
    """Of verl's platforms, the one that it lacks."""

    device_name = vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: CPUModule("torch_cpu"))

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, index: int) -> None:
        pass

    def synchronize(self, index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, message: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_resource_options(self, count: float) -> dict[str, float]:
        return {"num_gpus": count}

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def packed_attention(q: Any, k: Any, v: Any, cu_seqlens_q: Any, *args: Any, causal: bool = True, **_: Any) -> Any:
    """flash-attn's `flash_attn_varlen_func`."""
    places = torch.arange(len(q))
    segment = torch.bucketize(places, cu_seqlens_q[1:].long(), right=True)
    mask = segment[:, None] == segment[None, :]
    return _attend(q[None], k[None], v[None], mask.tril() if causal else mask)[0]


def padded_attention(q: Any, k: Any, v: Any, attention_mask: Any, length: int, is_causal: bool = True, **_: Any) -> Any:
    """transformers' `_flash_attention_forward` without padding."""
    return _attend(q, k, v, torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril() if is_causal else None)


def _join_over_gloo(timeout_second: int | None = None, backend: str | None = None) -> Any:
    return joined(timeout_second, backend or "gloo")  # verl's "cpu:gloo,cpu:gloo" names the device twice


joined = verl.utils.distributed.initialize_global_process_group_ray
verl.utils.distributed.initialize_global_process_group_ray = _join_over_gloo


def _extend_verl() -> None:
    import verl.models.transformers.qwen2_vl as qwen
    import verl.workers.engine.fsdp.transformer_impl as engine
    import verl.workers.engine_workers
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
    from verl.workers.rollout import base, replica

    verl.workers.engine_workers.initialize_global_process_group_ray = _join_over_gloo
    ReplayBuffer.__init__ = partialmethod(ReplayBuffer.__init__, poll_interval=0.1)  # it looks every other second
    pinned = engine.CPUOffloadPolicy
    engine.CPUOffloadPolicy = lambda pin_memory: pinned(pin_memory=False)  # which only an accelerator has use for
    for backend in ("fsdp", "fsdp2"):
        EngineRegistry._engines["language_model"][backend].setdefault("cpu", FSDPEngineWithLMHead)
    base._ROLLOUT_REGISTRY["hf", "async"] = "bench_rollout.ServerAdapter"

    def replicas() -> Any:
        import bench_rollout

        return bench_rollout.Replica

    replica.RolloutReplicaRegistry.register("hf", replicas)
    qwen.flash_attn_varlen_func, qwen._flash_attention_forward = packed_attention, padded_attention
    qwen._flash_supports_window_size = qwen._flash_supports_deterministic = False
    qwen._flash_deterministic_enabled = qwen._flash_use_top_left_mask = False
    qwen.fa_peft_integration_check = lambda q, k, v, target_dtype=None: (q, k, v)


_extend_verl()
