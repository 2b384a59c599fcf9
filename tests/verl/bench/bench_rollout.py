"""verl's rollout server without an inference engine: transformers' own `generate`, one process a replica."""

from __future__ import annotations

import asyncio
import os
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import bench_torchvision  # noqa: F401  (before transformers)
import ray
import torch
from transformers import LogitsProcessor
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput


@dataclass
class Request:
    """Of one prompt: its length, temperature and most tokens; tokens, pictures, seed, and where the answer goes."""

    kind: tuple[int, float, int]
    prompt: list[int]
    images: list[Any]
    seed: int
    answer: asyncio.Future


class Noise(LogitsProcessor):
    """Makes the greedy choice a draw at a temperature: every row has Gumbel noise of its own."""

    def __init__(self, seeds: list[int], temperature: float) -> None:
        self.draws, self.temperature = [torch.Generator().manual_seed(seed) for seed in seeds], temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=draw, dtype=torch.float64) for draw in self.draws])
        return scores.double() / self.temperature - (-uniform.log()).log()


class Server:
    """What it answers depends on prompt, images, weights' step and how often it was asked, not on who asks when.

    Requests that wait together are answered together where their prompts are of one length.
    """

    def __init__(self, config: Any, path: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        torch.set_num_threads(1)
        self.processor = AutoProcessor.from_pretrained(path)
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.config, self.step, self.asked = config, 0, Counter()
        tokens = self.processor.tokenizer
        self.banned = sorted({*tokens.all_special_ids, *tokens.get_added_vocab().values()} - {tokens.eos_token_id})
        self.waiting: list[Request] = []
        self.answering: asyncio.Task | None = None

    async def load(self, weights: list[tuple[str, torch.Tensor]], step: int | None) -> None:
        found = self.model.load_state_dict(dict(weights), strict=False)
        assert not found.unexpected_keys, found.unexpected_keys
        self.step = step or 0

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], image_data: Any = None, **_: Any
    ) -> TokenOutput:
        pictures = b"".join(image.tobytes() for image in image_data or [])
        problem = zlib.crc32(repr(prompt_ids).encode() + pictures), self.step
        self.asked[problem] += 1
        seed = zlib.crc32(repr((problem, self.asked[problem])).encode())
        length = sampling_params.get("max_tokens", self.config.response_length)
        kind = len(prompt_ids), sampling_params.get("temperature", 1.0), length
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append(Request(kind, prompt_ids, image_data or [], seed, answer))
        if self.answering is None:
            self.answering = asyncio.create_task(self._answer_all())
        return await answer

    async def _answer_all(self) -> None:
        while self.waiting:
            count = 0
            while count < len(self.waiting):  # until no more of them come
                count = len(self.waiting)
                await asyncio.sleep(0.02)
            together = [request for request in self.waiting if request.kind == self.waiting[0].kind]
            self.waiting = [request for request in self.waiting if request.kind != together[0].kind]
            try:
                for request, output in zip(together, self._answer(together), strict=True):
                    request.answer.set_result(output)
            except Exception as error:
                for request in together:
                    request.answer.set_exception(error)
        self.answering = None

    def _answer(self, requests: list[Request]) -> list[TokenOutput]:
        length, temperature, most = requests[0].kind
        ids, inputs = torch.tensor([request.prompt for request in requests]), {}
        images = [image for request in requests for image in request.images]
        if images:
            inputs = self.processor.image_processor(images=images, return_tensors="pt")
            inputs = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).long()
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **inputs,
            do_sample=False,
            logits_processor=[Noise([request.seed for request in requests], temperature)] if temperature else None,
            max_new_tokens=most,
            suppress_tokens=self.banned,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new, end = output.sequences[:, length:], self.processor.tokenizer.eos_token_id
        logprobs = torch.stack(output.logits, 1).float().log_softmax(-1).gather(2, new[:, :, None])[:, :, 0]
        answers = []
        for tokens, values in zip(new.tolist(), logprobs.tolist(), strict=True):
            count = tokens.index(end) + 1 if end in tokens else len(tokens)
            answers.append(
                TokenOutput(
                    token_ids=tokens[:count],
                    log_probs=values[:count],
                    stop_reason="completed",
                    extra_fields={"global_steps": self.step},
                )
            )
        return answers

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
        actor = ray.remote(Server).options(name=f"hf_server_{self.replica_rank}", max_concurrency=1024, num_cpus=0)
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
