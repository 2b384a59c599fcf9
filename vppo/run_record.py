"""What a run of `vppo train` was started with, and whether it is gone on with in the same way."""

from __future__ import annotations

import enum
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vppo.contents import PROCESSOR, WEIGHTS, digest_folder
from vppo.errors import InputError
from vppo.files import write_atomic
from vppo.folders import kind_of, read_object

if TYPE_CHECKING:
    from datasets import Dataset

RECORD_FILE = "options.json"
KEYS = ("config", "processes", "rows")
# what may change without changing what is trained: where things are, and what is logged, saved and evaluated
FREE_BEGINNINGS = ("log_", "logging_", "save_", "eval_", "hub_", "push_to_hub", "trackio_", "vllm_server_", "do_")
# fmt: off
FREE = frozenset((
    "output_dir", "resume", "resume_from_checkpoint", "report_to", "run_name", "project", "disable_tqdm",
    "num_completions_to_print", "debug", "per_device_eval_batch_size", "num_generations_eval",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "prediction_loss_only",
    "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "include_for_metrics", "skip_memory_metrics",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "include_num_input_tokens_seen", "scoring_memory", "check_kernels", "torch_empty_cache_steps", "ddp_timeout",
    "sampler_guard", "sampler_tolerance", "local_rank", "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode",
    "vllm_group_port", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint",
))
# fmt: on
DATA = ("dataset", "image_dir")  # told by the rows that come of them
LENGTH = ("max_steps", "num_train_epochs")  # a run may be made longer, unless its learning rate follows its length


def is_free(key: str) -> bool:
    """Whether a run may be gone on with under another value of a key."""
    return key in FREE or key.startswith(FREE_BEGINNINGS)


def read_record(output_dir: Path) -> dict[str, Any] | None:
    """What the run in a folder was started with; None where nothing says so.

    Raises:
        InputError: The record is broken, or is that of something else than a run of `vppo train`.
    """
    path = output_dir / RECORD_FILE
    if not path.exists():
        return None
    record = read_object(path, remedy="choose another output_dir, or remove that folder")
    if not record.keys() >= set(KEYS) or not isinstance(record["config"], dict):
        raise InputError(
            f"output_dir: {output_dir} holds {kind_of(output_dir)}, no run of `vppo train`; choose another output_dir"
        )
    return record


def write_record(
    output_dir: Path, config: Mapping[str, Any], processes: int, rows: str, model_files: str | None
) -> None:
    """Keeps what a run is started with.

    Args:
        output_dir: The run's folder.
        config: Keys and values as they were given.
        processes: How many train.
        rows: What `digest_rows` says.
        model_files: What `digest_model_files` says.
    """
    kept = {key: _located(key, _plain(value)) for key, value in config.items() if not is_free(key)}
    record = {"config": kept, "processes": processes, "rows": rows, "model_files": model_files}
    write_atomic(output_dir / RECORD_FILE, json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")


def check_same(
    output_dir: Path,
    before: tuple[Any, ...],
    now: tuple[Any, ...],
    processes: tuple[int, int],
    model_files: tuple[str | None, str | None],
) -> list[str]:
    """What is gone on with under another name; see `check_rows` for the data.

    Args:
        output_dir: The run's folder.
        before: The dataclasses of options that it was started with.
        now: Those that it would be gone on with, of the same classes.
        processes: How many trained, and how many would.
        model_files: What `digest_model_files` said of the model, and what it says.

    Raises:
        InputError: The run would be gone on with in another way than it was started.
    """
    said = []
    both = None not in model_files  # otherwise names decide
    for old, new in zip(before, now, strict=True):
        assert is_dataclass(old)
        for field in fields(old):
            values = [_located(field.name, _plain(getattr(options, field.name))) for options in (old, new)]
            if is_free(field.name) or (
                field.name in LENGTH and _plain(getattr(new, "lr_scheduler_type", "")) == "constant"
            ):
                continue
            if field.name in DATA or (field.name == "model" and both and model_files[0] == model_files[1]):
                if values[0] != values[1]:
                    said.append(f"{field.name}: {values[1]} holds what {values[0]} held when this run was started")
                continue
            if values[0] != values[1]:
                raise InputError(_difference(field.name, output_dir, *values))
            if field.name == "model" and both:
                raise InputError(
                    f"model: {values[1]} has other weights or settings than when the run in {output_dir} was started: "
                    "go on with those, or choose another output_dir"
                )
    if processes[0] != processes[1]:
        raise InputError(_difference("processes", output_dir, *processes))
    return said


def _difference(name: str, output_dir: Path, before: Any, now: Any) -> str:
    return (
        f"{name}: got {now!r}, but the run in {output_dir} was started with {before!r}: go on with that, or choose "
        "another output_dir (with resume: FOLDER/checkpoint-N it begins with weights and optimizer of this one, its "
        "learning rate included; with model: FOLDER/checkpoint-N with the weights alone)"
    )


def check_rows(output_dir: Path, dataset: str, record: Mapping[str, Any], rows: str) -> None:
    """Raises an `InputError` where the rows of a dataset are others than a run was started with.

    Args:
        output_dir: The run's folder.
        dataset: What they were read from.
        record: What `read_record` says.
        rows: What `digest_rows` says of them.
    """
    if record["rows"] != rows:
        raise InputError(
            f"dataset: {dataset} has other problems, answers or images than when the run in {output_dir} was started "
            f"with {record['config'].get('dataset')}: go on with those, or choose another output_dir"
        )


def digest_model_files(model: str) -> str | None:
    """A fingerprint of a model's folder; None for a model on the hub, which has its name and revision."""
    folder = Path(model)
    return digest_folder(folder, (*WEIGHTS, *PROCESSOR)) if folder.is_dir() else None


def digest_rows(dataset: Dataset) -> str:
    """A fingerprint of the rows of `load_training_data`: of images the bytes, wherever they are."""
    found = hashlib.sha256()
    with ThreadPoolExecutor() as pool:  # a picture that the rows name by its path is read
        for batch in dataset.with_format("arrow").iter(batch_size=256):
            for line in pool.map(_line, batch.to_pylist()):
                found.update(line)
    return found.hexdigest()[:16]


def _line(row: dict[str, Any]) -> bytes:
    pictures = [one["bytes"] or Path(one["path"]).read_bytes() for one in row.get("images") or ()]
    return json.dumps({**row, "images": pictures}, sort_keys=True, default=_digestible).encode() + b"\n"


def _digestible(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)


def _plain(value: Any) -> Any:
    """A value as JSON has it; what has no such form (transformers makes objects of some options) counts as nothing."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else None


def _located(name: str, value: Any) -> Any:
    """The same file is the same however it is named."""
    if (
        name in ("model", "dataset", "image_dir")
        and isinstance(value, str)
        and os.path.exists(os.path.expanduser(value))
    ):
        return os.path.realpath(os.path.expanduser(value))
    return value
