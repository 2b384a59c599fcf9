"""Training steps of a policy that FSDP2 shards over processes of this machine's CPU."""

from __future__ import annotations

import os
import socket
import weakref
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.contest import Elsewhere
from benchmarks.policy import Policy, TrainingStep

LAUNCHED = {  # by `accelerate launch --use_fsdp --fsdp_version 2`
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "ACCELERATE_TORCH_DEVICE": "cpu",
}


class ShardedStep(Elsewhere):
    """A `TrainingStep` of several processes, which live as long as this object.

    Args:
        policy: With its number of processes.
        rows: Rollouts of a step, of all processes.
        options: See `TrainingStep`.

    Attributes:
        tokens: That passed the language model in the last step, of all processes.

    Raises:
        RuntimeError: A process cannot begin, or has ended.
    """

    def __init__(self, policy: Policy, rows: int, **options: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context: Any = mp.get_context("spawn")
        self.tokens, self._pipes = 0, list[Connection]()
        self._workers = workers = list[Any]()
        for rank in range(policy.processes):
            pipe, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, rank, port, policy, rows, options), daemon=True)
            worker.start()
            theirs.close()
            self._pipes.append(pipe)
            workers.append(worker)
        weakref.finalize(self, lambda: [worker.kill() for worker in workers])
        self._answers()

    def __call__(self) -> Tensor:
        """The mean loss of the step."""
        for pipe in self._pipes:
            pipe.send("step")
        losses, tokens = zip(*self._answers(), strict=True)
        self.tokens = sum(tokens)
        return torch.tensor(losses).mean()

    def _answers(self) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                answer = pipe.recv()
            except EOFError as error:
                raise RuntimeError(f"process {rank} has ended") from error
            if isinstance(answer, str):
                raise RuntimeError(f"process {rank}: {answer}")
            answers.append(answer)
        return answers


def _work(pipe: Connection, rank: int, port: int, policy: Policy, rows: int, options: dict[str, Any]) -> None:
    """What a process does: a step each time it is told to, until the other end is gone."""
    import torch.distributed as dist
    from accelerate.state import DistributedType, PartialState
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    os.environ.update(LAUNCHED, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(policy.processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        dist.init_process_group("gloo")
        # accelerate shards only over what it takes for accelerators, so the CPUs have to be some
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
        step = TrainingStep(policy, rows, torch.device("cpu"), **options)
        if not all(isinstance(weight, DTensor) for weight in step.model.parameters()):
            raise RuntimeError("the model is not sharded")
        pipe.send((0.0, 0))
        while pipe.recv():
            loss = step()
            pipe.send((loss.item(), step.tokens))
    except EOFError:
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise
