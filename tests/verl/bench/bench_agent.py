"""An agent loop for the digits: rollouts of a prompt share what is prepared of it, and are graded where they arrive.

verl's own prepares every rollout by itself and sends it to another process to be graded; on two cores that takes longer
than to sample.
"""

from __future__ import annotations

import asyncio
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from vppo.rewards import accuracy_reward

PREPARED: dict[tuple[str, str], asyncio.Future[Any]] = {}  # by a prompt's name and what is prepared of it
MOST = 2048


@register("shared_prompt")
class SharedPromptLoop(SingleTurnAgentLoop):
    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        self.uid = kwargs["uid"]
        output = await super().run(sampling_params, **kwargs)
        text = self.tokenizer.decode(output.response_ids, skip_special_tokens=True)
        (output.reward_score,) = accuracy_reward([text], [kwargs["reward_model"]["ground_truth"]])
        output.extra_fields["reward_extra_info"] = {"acc": output.reward_score}
        return output

    async def process_multi_modal_info(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        return await self._once("pictures", super().process_multi_modal_info, messages)

    async def ct_build_initial_tokens(self, messages: list[dict[str, Any]], *args: Any, **kwargs: Any) -> list[int]:
        return list(await self._once("tokens", super().ct_build_initial_tokens, messages, *args, **kwargs))

    async def _once(self, what: str, prepare: Any, *args: Any, **kwargs: Any) -> Any:
        key = self.uid, what
        if key not in PREPARED:
            while len(PREPARED) >= MOST:
                PREPARED.pop(next(iter(PREPARED)))
            PREPARED[key] = asyncio.ensure_future(prepare(*args, **kwargs))
        return await PREPARED[key]
