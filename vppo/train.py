"""`vppo train`: one run of `VPPOTrainer`, from a config to a trained model."""

from __future__ import annotations

import logging
import typing
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vppo.checkpoints import checkpoints, last_complete_checkpoint, named_checkpoint
from vppo.data import BadRowError, load_training_data
from vppo.data.bad_rows import read_bad_rows, write_bad_rows
from vppo.errors import InputError
from vppo.files import write_atomic, writing
from vppo.folders import kind_of
from vppo.loading import load_processor
from vppo.locks import claimed
from vppo.processes import on_first
from vppo.progress import read_lines
from vppo.rewards.named import load_rewards
from vppo.run_record import check_rows, check_same, digest_model_files, digest_rows, read_record, write_record
from vppo.train_config import (
    Config,
    ScriptArguments,
    check_complete,
    check_keys,
    load_config,
    make_arguments,
    resolved,
)
from vppo.vllm_engine import check_version

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import ModelConfig

    from vppo.config import VPPOConfig

__all__ = ["ScriptArguments", "load_config", "train"]
logger = logging.getLogger(__name__)
WRITTEN = ("config.yaml", "timings.jsonl", "skipped_rows.jsonl", "completions", "model", "README.md")


def train(config: Config) -> Path:
    """Trains a model as a config says.

    Writes under `output_dir`: `metrics.jsonl` (a line a logged step), `config.yaml` (what was asked for, with what the
    recipe filled in; `vppo train` takes it again), `options.json` (what a run that goes on must have in common with
    it), `checkpoint-N/` and, at the end, `model/`. With `bad_rows: skip` also `skipped_rows.jsonl`; a run that goes on
    leaves out what it lists. While it runs, no other run is let into the folder.

    Args:
        config: What `load_config` returns, or the same keys and values from Python.

    Returns:
        The folder of the run.

    Raises:
        InputError: Something in the config, the data, the model folder or `output_dir` cannot be used; raised before
            any step. Or the disk takes no more, or another process of the run is gone.
        SystemExit: With code 143, after SIGTERM; a checkpoint is saved then, unless `save_strategy` is "no".
    """
    check_keys(config, "config")
    check_complete(config, "config")
    script, model_args, args = make_arguments(config)
    with ExitStack() as held:
        return _train(config, script, model_args, args, held)


def _train(config: Config, script: ScriptArguments, model_args: ModelConfig, args: VPPOConfig, held: ExitStack) -> Path:
    output_dir = Path(str(args.output_dir))
    checkpoint, record = on_first(lambda: _enter(script.resume, output_dir, held))
    model_files = on_first(lambda: digest_model_files(script.model))
    renamed: list[str] = []
    if record is not None:
        try:
            before = make_arguments({**record["config"], "output_dir": script.output_dir})
        except (InputError, TypeError) as error:
            raise InputError(f"{output_dir / 'options.json'}: {error}; choose another output_dir") from error
        renamed = check_same(
            output_dir,
            before,
            (script, model_args, args),
            (record["processes"], args.world_size),
            (record.get("model_files"), model_files),
        )
    if checkpoint:
        args.eval_on_start = False  # the run has begun long since
    _check_installed(args)
    rewards = load_rewards(script.reward, args.reward_weights)
    processor = load_processor(
        script.model,
        revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code,
        min_pixels=script.min_pixels,
        max_pixels=script.max_pixels,
    )
    skipped: list[BadRowError] = []
    skipped_path = output_dir / "skipped_rows.jsonl"
    skipped_before = read_bad_rows(skipped_path) if checkpoint and skipped_path.exists() else None

    def load(name: str, split: str) -> Dataset:
        return load_training_data(
            name,
            options=replace(script.data, split=split),
            bad_rows=script.bad_rows,
            processor=processor,
            skipped=skipped,
            skipped_before=skipped_before,
        )

    eval_dataset = None
    with args.main_process_first(desc="loading the dataset"):  # the others then find the rows in the cache
        dataset = load(script.dataset, script.dataset_split)
        if script.eval_dataset is not None and (args.eval_strategy != "no" or args.eval_on_start):
            eval_dataset = load(script.eval_dataset, script.eval_dataset_split)
    _check_length(len(dataset), args)
    rows = on_first(lambda: digest_rows(dataset))
    if record is not None:
        check_rows(output_dir, script.dataset, record, rows)
    benchmarks = _benchmarks(script)
    trainer = _make_trainer(script, model_args, args, rewards, dataset, eval_dataset, processor)
    if benchmarks:
        from vppo.evaluation.callback import BenchmarkCallback

        trainer.add_callback(
            BenchmarkCallback(
                trainer,
                benchmarks,
                steps=script.eval_benchmarks_steps,
                limit=script.eval_benchmarks_limit,
                samples=script.eval_benchmarks_samples,
                memory=args.scoring_memory,
            )
        )
    if trainer.is_world_process_zero():
        write_record(output_dir, config, args.world_size, rows, model_files)
        write_atomic(output_dir / "config.yaml", resolved(config, script, args))
        if script.bad_rows == "skip":
            write_bad_rows(skipped_path, skipped)
    if skipped:
        count = f"{len(skipped)} row{'s' if len(skipped) > 1 else ''}"
        trainer.accelerator.print(f"Skipped {count}, listed in {skipped_path}; the first: {skipped[0]}")
    if checkpoint:
        trainer.accelerator.print("\n".join([f"Going on from {checkpoint}", *renamed]))
    trainer.accelerator.print(trainer.describe_sampler())
    _run(trainer, checkpoint)
    with writing(output_dir / "model", "make room; with resume: true the run then only saves its model"):
        trainer.save_model(str(output_dir / "model"))
        trainer.create_model_card(model_name=output_dir.name)
        if trainer.is_world_process_zero():  # the folder that people upload
            write_atomic(output_dir / "model" / "README.md", (output_dir / "README.md").read_text(encoding="utf-8"))
    trainer.accelerator.print(f"Done: {output_dir / 'model'}")
    return output_dir


def _enter(resume: bool | str, output_dir: Path, held: ExitStack) -> tuple[Path | None, Config | None]:
    """Claims the folder of a run until `held` is closed.

    Returns:
        The checkpoint to go on from, and what the run that is gone on with was started with; None for neither.
    """
    held.enter_context(claimed(output_dir, "output_dir"))
    record = read_record(output_dir)
    trained = (output_dir / "metrics.jsonl").exists() or bool(checkpoints(output_dir))
    if trained and not resume:
        raise InputError(f"output_dir: {output_dir} already holds a run: go on with resume: true, or choose another")
    taken = [name for name in WRITTEN if (output_dir / name).exists()]
    if taken and not trained and record is None:
        raise InputError(
            f"output_dir: {output_dir} holds {kind_of(output_dir)}, of which {', '.join(taken)} would be overwritten; "
            "takes a new folder, or that of a run to resume"
        )
    if not resume:
        return None, None  # of a run that did not come to its first step nothing is kept
    if record is None and trained:
        logger.warning(f"{output_dir} does not say what its run was started with: make sure that it is the same")
    for name in ("metrics.jsonl", "timings.jsonl"):
        read_lines(output_dir / name, cut_short=True)  # before a model is loaded
    if isinstance(resume, str):
        return named_checkpoint(resume), record
    return last_complete_checkpoint(output_dir), record


def _check_installed(args: VPPOConfig) -> None:
    """transformers finds out only once the model is loaded."""
    from transformers.integrations import integration_utils
    from transformers.utils import is_liger_kernel_available

    for name in typing.cast(list[str], args.report_to):
        known = name in integration_utils.INTEGRATION_TO_CALLBACK
        if known and name not in integration_utils.get_available_reporting_integrations():
            raise InputError(f"report_to: got {name!r}, which is not installed (or not set up): pip install {name}")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise InputError("use_liger_kernel: Liger is not installed: pip install 'vppo-kernels[liger]'")
    if args.use_vllm:
        check_version()


def _check_length(rows: int, args: VPPOConfig) -> None:
    """TRL makes no step where the rows do not fill one generation batch, and none in no epoch."""
    assert args.generation_batch_size and args.num_generations
    prompts = args.generation_batch_size // args.num_generations
    if rows < prompts:
        raise InputError(
            f"dataset: {rows} rows, takes {prompts}: a step needs generation_batch_size / num_generations = "
            f"{args.generation_batch_size} / {args.num_generations} prompts; give it more rows, or lower "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise InputError(f"num_train_epochs: got {args.num_train_epochs}, takes a number above 0")


def _benchmarks(script: ScriptArguments) -> list[Any]:
    """What `eval_benchmarks` names."""
    if not script.eval_benchmarks:
        return []
    from vppo.evaluation.benchmarks import PUBLISHED_SETS, load_benchmarks

    names = [name for name in script.eval_benchmarks if name in PUBLISHED_SETS]
    data = [name for name in script.eval_benchmarks if name not in PUBLISHED_SETS]
    options = replace(script.data, split=script.eval_dataset_split)
    return load_benchmarks(names, data, options, script.eval_benchmarks_mirror)


def _make_trainer(
    script: ScriptArguments,
    model_args: ModelConfig,
    args: VPPOConfig,
    rewards: list[Any],
    dataset: Any,
    eval_dataset: Any,
    processor: Any,
) -> Any:
    from transformers import PrinterCallback
    from trl import get_peft_config, get_quantization_config

    from vppo.preemption import StopOnSigterm
    from vppo.progress import TrainingProgress
    from vppo.trainer import VPPOTrainer

    peft_config: Any = get_peft_config(model_args)
    if peft_config is not None:
        peft_config.exclude_modules = ["lm_head"]  # a pattern must not reach it either
    try:
        trainer = VPPOTrainer(
            model=script.model,
            reward_funcs=rewards,
            args=args,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            quantization_config=get_quantization_config(model_args),
            peft_config=peft_config,
            callbacks=[TrainingProgress(Path(str(args.output_dir)) / "metrics.jsonl"), StopOnSigterm()],
        )
    except (
        ImportError,
        OSError,
        ValueError,
    ) as error:  # such as an extra that is not installed
        raise InputError(f"config: the trainer cannot be built for {script.model}: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _run(trainer: Any, checkpoint: Path | None) -> None:
    """Trains to the end, or until SIGTERM."""
    import torch.distributed as dist

    from vppo.preemption import EXIT_CODE, StopOnSigterm

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not lost or trainer.args.world_size == 1:
            raise
        raise InputError(
            f"process {trainer.args.process_index}: another process of this run has ended or does not answer; what it "
            f"said is the reason; go on with resume: true ({str(error).splitlines()[0]})"
        ) from error
    stop = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StopOnSigterm))
    if stop.stopped:
        step = trainer.state.global_step
        kept = f"checkpoint-{step} is saved" if stop.saved else "save_strategy is 'no', so nothing is saved"
        trainer.accelerator.print(f"Ended by SIGTERM after step {step}; {kept}. Go on with --resume true")
        raise SystemExit(EXIT_CODE)
