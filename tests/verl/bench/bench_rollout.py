"""verl's rollout server without an inference engine: transformers' own `generate`, one process a replica."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from typing import Any

import bench_torchvision  # noqa: F401  (before transformers)
import ray
import torch
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from vppo.processors import placeholder_tokens


class Server:
    """What it answers depends on prompt, images, weights' step and how often it was asked, not on who asks when."""

    def __init__(self, config: Any, path: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        torch.set_num_threads(1)
        self.processor = AutoProcessor.from_pretrained(path)
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.config, self.step, self.asked = config, 0, Counter()
        self.banned = placeholder_tokens(self.model.config)

    async def load(self, weights: list[tuple[str, torch.Tensor]], step: int | None) -> None:
        unexpected = self.model.load_state_dict(dict(weights), strict=False).unexpected_keys
        assert not unexpected, unexpected
        self.step = step or 0

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], image_data: Any = None, **_: Any
    ) -> TokenOutput:
        ids, inputs = torch.tensor([prompt_ids]), {}
        if image_data:
            inputs = self.processor.image_processor(images=image_data, return_tensors="pt")
            inputs = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).long()
        pictures = b"".join(image.tobytes() for image in image_data or [])
        problem = zlib.crc32(repr(prompt_ids).encode() + pictures), self.step
        self.asked[problem] += 1
        torch.manual_seed(zlib.crc32(repr((problem, self.asked[problem])).encode()))
        temperature = sampling_params.get("temperature", 1.0)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **inputs,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=0,
            max_new_tokens=sampling_params.get("max_tokens", self.config.response_length),
            suppress_tokens=self.banned,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = output.sequences[0, len(prompt_ids) :]
        logprobs = torch.cat(output.logits).float().log_softmax(-1).gather(1, new[:, None])[:, 0]
        return TokenOutput(
            token_ids=new.tolist(),
            log_probs=logprobs.tolist(),
            stop_reason="completed",
            extra_fields={"global_steps": self.step},
        )

    async def wake_up(self, tags: Any = None) -> None:
        pass

    async def sleep(self) -> None:
        pass

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        pass

    async def resume_generation(self) -> None:
        pass

    async def clear_kv_cache(self) -> None:
        pass


class Replica(RolloutReplica):
    """One `Server`."""

    async def launch_servers(self) -> None:
        actor = ray.remote(Server).options(name=f"hf_server_{self.replica_rank}", max_concurrency=16, num_cpus=0)
        server = actor.remote(self.config, self.model_config.path)
        await server.wake_up.remote()
        self.servers, self._server_handle, self._server_address = [server], server, f"hf-{self.replica_rank}"


class ServerAdapter(BaseRollout):
    """A rank's way to its replica: hands over the weights."""

    async def resume(self, tags: Any) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        named = [(name, weight.detach().float().cpu().clone()) for name, weight in weights]  # all ranks gather
        rank, ranks = int(os.environ["RANK"]), self.config.tensor_model_parallel_size
        if rank % ranks == 0:
            await ray.get_actor(f"hf_server_{rank // ranks}").load.remote(named, global_steps)
