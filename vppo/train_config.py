"""What `vppo train` is told: a YAML file and the command line's overrides, checked, and the arguments made of them."""

from __future__ import annotations

import copy
import difflib
import enum
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vppo.data import DataOptions, RowOptions
from vppo.errors import InputError
from vppo.monitoring.evaluation_options import evaluation_defaults
from vppo.rewards.named import beside
from vppo.words import load_yaml, parse_word

if TYPE_CHECKING:
    from trl import ModelConfig

    from vppo.config import VPPOConfig

Config = dict[str, Any]
STRATEGIES = ("eval_strategy", "logging_strategy", "save_strategy")
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
        check_keys(part, source)
        if "reward" in part:
            part["reward"] = beside(order, part["reward"])
    config |= changes
    check_complete(config, str(path))
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


def check_keys(config: Config, source: str) -> None:
    """Raises an `InputError` where a key does not exist, or a value has the wrong type; `source` is where it stands."""
    for key, value in config.items():
        if key not in _hints():
            close = [NOT_KEYS[key]] if key in NOT_KEYS else difflib.get_close_matches(str(key), _hints(), cutoff=0.7)
            meant = f"; did you mean {' or '.join(close)}?" if close else ""
            raise InputError(f"{source}: unknown key {key!r}{meant}")
        if not _fits(value, _hints()[key]):
            got = f"{value!r} ({type(value).__name__})"
            raise InputError(f"{source}: {key}: got {got}, takes {_describe(_hints()[key])}")


def check_complete(config: Config, source: str) -> None:
    """Raises an `InputError` where a key that has no default is missing."""
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


def resolved(config: Config, script: ScriptArguments, args: VPPOConfig) -> str:
    """The config as asked for, with every knob of this library's own."""
    from vppo.config import VPPOConfig
    from vppo.options import VPPOOptions

    own = {name: getattr(args, name) for of in (VPPOOptions, VPPOConfig) for name in of.__annotations__}
    plain = {key: value.value if isinstance(value, enum.Enum) else value for key, value in own.items()}
    return yaml.safe_dump({**asdict(script), **plain, **config}, sort_keys=True, allow_unicode=True)
