"""`vppo train`: a YAML file, the command line's overrides, and one run of `VPPOTrainer`."""

from __future__ import annotations

import copy
import difflib
import enum
import logging
import os
import types
import typing
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vppo.checkpoints import checkpoints, last_complete_checkpoint, named_checkpoint
from vppo.data import BadRowError, DataOptions, RowOptions, load_training_data
from vppo.data.bad_rows import read_bad_rows, write_bad_rows
from vppo.errors import InputError
from vppo.files import write_atomic, writing
from vppo.folders import kind_of
from vppo.loading import load_processor
from vppo.locks import claimed
from vppo.monitoring.evaluation_options import evaluation_defaults
from vppo.processes import on_first
from vppo.progress import read_lines
from vppo.rewards.named import beside, load_rewards
from vppo.run_record import check_rows, check_same, digest_model_files, digest_rows, read_record, write_record
from vppo.vllm_engine import check_version
from vppo.words import load_yaml, parse_word

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import ModelConfig

    from vppo.config import VPPOConfig

logger = logging.getLogger(__name__)
Config = dict[str, Any]
STRATEGIES = ("eval_strategy", "logging_strategy", "save_strategy")
WRITTEN = ("config.yaml", "timings.jsonl", "skipped_rows.jsonl", "completions", "model", "README.md")
NOT_KEYS = {"model_name_or_path": "model", "resume_from_checkpoint": "resume"}  # two names for one thing


@dataclass(frozen=True, kw_only=True)
class ScriptArguments(RowOptions):
    """The keys of a config that are neither `VPPOConfig`'s nor TRL's `ModelConfig`'s.

    Both sets of data are read by the fields of `vppo.data.RowOptions`, which are keys too.

    Attributes:
        model: A model on the hub, or a folder as `save_pretrained` writes it.
        dataset: See `vppo.data.load_training_data`.
        output_dir: Where metrics, config, checkpoints and the trained model go.
        eval_dataset: What the model is evaluated on while it trains; None for no evaluation. Without `eval_strategy`,
            see `vppo.monitoring.evaluation_options.evaluation_defaults`.
        dataset_split, eval_dataset_split: Which rows of them, see `vppo.data.DataOptions`.
        eval_benchmarks: Sets that `vppo eval` knows, or files of problems, of which a subset is answered while the
            model trains; see `vppo.evaluation.callback.BenchmarkCallback`.
        eval_benchmarks_steps: Steps between two such evaluations.
        eval_benchmarks_limit: Questions of each set.
        eval_benchmarks_samples: Answers to each question.
        eval_benchmarks_mirror: A folder with copies of the sets' repositories, instead of the hub.
        bad_rows: "error" refuses data with rows that cannot be used; "skip" goes on without them and lists them in
            `skipped_rows.jsonl`.
        min_pixels: Smaller images are enlarged to this many pixels; None keeps the processor's own limit.
        max_pixels: Larger images are reduced to this many pixels; None keeps the processor's own limit.
        reward: "accuracy" (`vppo.rewards.accuracy_reward`), "format" (`vppo.rewards.format_reward`),
            `module:function` or `file.py:function`, called as TRL calls rewards; or a list of such, weighted by TRL's
            `reward_weights`.
        resume: True goes on from the last complete checkpoint in `output_dir` (from the beginning if it has none); a
            path goes on from that checkpoint, or from the last complete one of that run. What is trained must be what
            the run in `output_dir` was started with.
    """

    model: str
    dataset: str
    output_dir: str
    dataset_split: str = "train"
    eval_dataset: str | None = None
    eval_dataset_split: str = "test"
    eval_benchmarks: list[str] | None = None
    eval_benchmarks_steps: int = 50
    eval_benchmarks_limit: int = 64
    eval_benchmarks_samples: int = 1
    eval_benchmarks_mirror: str | None = None
    bad_rows: typing.Literal["error", "skip"] = "error"
    min_pixels: int | None = None
    max_pixels: int | None = None
    reward: str | list[str] = "accuracy"
    resume: bool | str = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "model", os.path.expanduser(self.model))
        if isinstance(self.resume, str):
            object.__setattr__(self, "resume", os.path.expanduser(self.resume))
        for name in ("min_pixels", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, takes a number of pixels from 1")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels: got {self.min_pixels}, takes at most max_pixels, which is {self.max_pixels}")

    @property
    def data(self) -> DataOptions:
        """How the dataset is read."""
        rows = {field.name: getattr(self, field.name) for field in fields(RowOptions)}
        return DataOptions(split=self.dataset_split, **rows)


# -- configs -----------------------------------------------------------------------------------------------------------

# Not by TRL's TrlParser: it lets an unknown word of the command line pass, takes true for a whole number, and answers a
# value of the wrong type with 200 lines of usage.


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a training config and checks its keys and types.

    Args:
        path: A YAML file. Its keys are the fields of `VPPOConfig`, of TRL's `ModelConfig` and of `ScriptArguments`.
        overrides: Command-line words: `--key value`, `--key=value`, or `--key` alone for true. Where a key takes text,
            the word is that text; numbers, true and false, lists and mappings are YAML. Dashes and underscores in keys
            are the same.

    Returns:
        Keys and values, ready for `train`.

    Raises:
        InputError: The file cannot be read, a key does not exist or is missing, or a value has the wrong type.
    """
    try:
        config = load_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: must be keys and values (model: ...), got {type(config).__name__}")
    changes = parse_overrides(overrides)
    folders = [Path(path).absolute().parent, Path.cwd()]
    for part, source, order in ((config, str(path), folders), (changes, "command line", folders[::-1])):
        for key in STRATEGIES:
            if part.get(key) is False:
                part[key] = "no"  # which YAML takes for false
        _check(part, source)
        if "reward" in part:
            part["reward"] = beside(order, part["reward"])
    config |= changes
    _check_complete(config, str(path))
    return config


def parse_overrides(words: Sequence[str]) -> Config:
    """`--key value`, `--key=value` and `--key` as a dict; see `load_config`. A key that does not exist takes YAML."""
    changes: Config = {}
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--") or word == "--":
            raise InputError(f"command line: expected --key value, got {word!r}")
        key, equals, text = word[2:].partition("=")
        name = key.replace("-", "_")
        if not equals and (not remaining or remaining[0].startswith("--")):
            changes[name] = True
            continue
        text = text if equals else remaining.pop(0)
        try:
            changes[name] = parse_word(text, _hints()[name]) if name in _hints() else load_yaml(text or "''")
        except (yaml.YAMLError, ValueError) as error:
            raise InputError(f"command line: --{key} takes a YAML value, got {text!r}: {error}") from error
    return changes


@cache
def _hints() -> dict[str, Any]:
    """Every key a config may have, and its type."""
    from trl import ModelConfig

    from vppo.config import VPPOConfig

    hints: dict[str, Any] = {}
    for kind in (VPPOConfig, ModelConfig, ScriptArguments):
        types_of = typing.get_type_hints(kind)
        for field in fields(kind):
            choices = (*field.metadata.get("choices", ()), *([None] if field.default is None else []))
            if field.init:
                hints[field.name] = typing.Literal[choices] if "choices" in field.metadata else types_of[field.name]
    hints["image_dir"] = str | None  # a config holds no Path
    hints["lora_target_modules"] = str | list[str] | None  # TRL's hint leaves out "all-linear"
    return {key: hint for key, hint in hints.items() if key not in NOT_KEYS}


def _check(config: Config, source: str) -> None:
    for key, value in config.items():
        if key not in _hints():
            close = [NOT_KEYS[key]] if key in NOT_KEYS else difflib.get_close_matches(str(key), _hints(), cutoff=0.7)
            meant = f"; did you mean {' or '.join(close)}?" if close else ""
            raise InputError(f"{source}: unknown key {key!r}{meant}")
        if not _fits(value, _hints()[key]):
            got = f"{value!r} ({type(value).__name__})"
            raise InputError(f"{source}: {key}: got {got}, takes {_describe(_hints()[key])}")


def _check_complete(config: Config, source: str) -> None:
    for field in fields(ScriptArguments):
        if field.default is MISSING and field.name not in config:
            raise InputError(f"{source}: missing key {field.name!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool  # Python takes True for 1; a config should not
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or hint)


def _describe(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(argument) for argument in arguments if not _is_enum(argument)))
    if hint is type(None):
        return "null"
    if origin is typing.Literal:
        return f"one of {list(arguments)}"
    if origin is list:
        return f"a list ({_describe(arguments[0])})"
    return names.get(origin or hint, str(hint))


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


# -- the run -----------------------------------------------------------------------------------------------------------


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
    _check(config, "config")
    _check_complete(config, "config")
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
        write_atomic(output_dir / "config.yaml", _resolved(config, script, args))
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


def make_arguments(config: Config) -> tuple[ScriptArguments, ModelConfig, VPPOConfig]:
    """The three parts of a config.

    Args:
        config: Checked keys and values.

    Returns:
        What is this script's, what loads the model, and what trains it. Where the config does not say, every step is
        logged, bfloat16 is used if the device has it, and evaluations are those of `evaluation_defaults`.

    Raises:
        InputError: A value is out of its range; the message is that of the class that refused it.
    """
    from transformers.utils import is_torch_bf16_gpu_available
    from trl import ModelConfig

    from vppo.config import VPPOConfig

    given = copy.deepcopy(config)  # transformers writes into nested options, and the config is read again

    def of(kind: type) -> Config:
        return {field.name: given[field.name] for field in fields(kind) if field.name in given}

    defaults: Config = {"logging_steps": 1, "disable_tqdm": True, **evaluation_defaults(config)}
    if not config.get("fp16"):
        defaults["bf16"] = is_torch_bf16_gpu_available()
    try:
        script, model_args = ScriptArguments(**of(ScriptArguments)), ModelConfig(**of(ModelConfig))
        args = VPPOConfig(**defaults | of(VPPOConfig))
    except (TypeError, ValueError) as error:
        raise InputError(f"config: {error}") from error
    model_args.lora_target_modules = config.get("lora_target_modules", "all-linear")
    for name in ("lora_target_modules", "lora_modules_to_save"):
        if "lm_head" in (getattr(model_args, name) or ()):
            raise InputError(f"config: {name}: must not name lm_head, whose weight the divergence is computed with")
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **typing.cast(Config, args.model_init_kwargs or {}),
    }
    return script, model_args, args


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


def _resolved(config: Config, script: ScriptArguments, args: VPPOConfig) -> str:
    """The config as asked for, with every knob of this library's own."""
    from vppo.config import VPPOConfig
    from vppo.options import VPPOOptions

    own = {name: getattr(args, name) for of in (VPPOOptions, VPPOConfig) for name in of.__annotations__}
    plain = {key: value.value if isinstance(value, enum.Enum) else value for key, value in own.items()}
    return yaml.safe_dump({**asdict(script), **plain, **config}, sort_keys=True, allow_unicode=True)
