"""A run of `vppo train` of seconds, for the tests that break it; as a script, one that is killed again and again."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

STEPS = 4
REWARD = """def letters(completions, answer, **_):
    return [sum(map(ord, c[0]["content"])) % 7 + len(a) for c, a in zip(completions, answer)]
"""


def prepare(folder: Path, **changes: Any) -> dict[str, Any]:
    """Writes an untrained model and eight problems; returns a config that saves after each of `STEPS` steps."""
    from vppo.demo.model import build_model, build_processor

    processor = build_processor()
    build_model(processor, seed=0).save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    rows = []
    for number in range(8):
        Image.effect_noise((84, 28), 10 * number).save(folder / f"{number}.png")
        rows.append({"problem": f"{number}+1?", "answer": str(number + 1), "images": [f"{number}.png"]})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "letters_reward.py").write_text(REWARD)
    never_answered = sorted(set(processor.tokenizer.all_special_ids) - {processor.tokenizer.eos_token_id})
    return {
        "model": str(folder / "start"),
        "dataset": str(folder / "train.jsonl"),
        "reward": f"{folder}/letters_reward.py:letters",
        "system_prompt": "",
        "instruction": "",
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "generation_kwargs": {"suppress_tokens": never_answered},
        "max_steps": STEPS,
        "save_steps": 1,
        "learning_rate": 1e-3,
        **changes,
    }


def ending(run: Path) -> tuple[str, dict[str, bytes]]:
    """What a run has come to: the lines of its metrics, and its trained weights."""
    return (run / "metrics.jsonl").read_text(), {p.name: p.read_bytes() for p in (run / "model").glob("*.safetensors")}


def before(module: Any, name: str, fault: Callable[[], Any], put: Callable[..., None] = setattr, call: int = 1) -> None:
    """Has a fault come before the `call`-th call of a function from here on."""
    function, calls = getattr(module, name), []

    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            fault()
        return function(*args, **kwargs)

    put(module, name, faulty)


def save_points() -> dict[str, tuple[Any, str]]:
    """The functions before which a save may be interrupted, from its first file to what comes after its last."""
    import torch
    import transformers

    from vppo import checkpoints, manifest, saved_trainer

    return {
        "before anything": (manifest, "begin"),
        "before the weights": (transformers.PreTrainedModel, "save_pretrained"),
        "before the optimizer": (transformers.Trainer, "_save_optimizer_and_scheduler"),
        "before the random state": (transformers.Trainer, "_save_rng_state"),
        "before the state": (transformers.TrainerState, "save_to_json"),
        "before the manifest": (manifest, "finish"),
        "before the manifest's name": (manifest, "sync"),
        "before older ones go": (saved_trainer, "drop_older"),
        "while older ones go": (checkpoints.shutil, "rmtree"),
        "in the middle of a file": (torch, "save"),
    }


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def killed_and_resumed(config: dict[str, Any]) -> None:
    """One run, killed at every point of a save and resumed each time, each in a process of its own."""
    import vppo.trainer  # imported once, here: the children are forks  # noqa: F401
    from vppo.train import train

    for point, (module, name) in (*save_points().items(), ("", (None, ""))):
        child = os.fork()
        if child == 0:
            if module is not None:
                before(module, name, die)
            train({**config, "resume": True})
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if module is None:
            assert status == 0, status
        else:
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
            print("killed", point, flush=True)


if __name__ == "__main__":
    killed_and_resumed(json.loads(sys.argv[1]))
