"""What a plan is made from, and how a training config says it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from vppo.errors import InputError
from vppo.plan.presets import NAMES, preset
from vppo.prefix_sharing import GIB

TEXT_TOKENS = 512  # of a prompt beside its images, where nobody says
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How FSDP2 shards, as accelerate is told.

    Attributes:
        layers: Whether every layer is gathered by itself; else the model is gathered as one.
        reshard: Whether a layer's weights are let go after its forward, and gathered again for its backward.
        sync: Whether gradients are reduced after every micro-batch; else each process adds up whole ones.
        offload: Whether shards lie in the CPU's memory.
    """

    layers: bool = True
    reshard: bool = True
    sync: bool = False
    offload: bool = False


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Where responses are sampled.

    Attributes:
        kind: "vllm" in the trainer's own processes, "server" for vLLM on other GPUs, "model" for its own `generate`.
        share: Of a GPU that vLLM takes.
        gpus: Over which vLLM spreads one copy of the weights.
        sleeps: Whether it gives its memory back while the model is trained.
        length: Tokens of the longest prompt and response together.
    """

    kind: str
    share: float
    gpus: int
    sleeps: bool
    length: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and settings of a run, on one of its GPUs.

    Attributes:
        config: The model's configuration, of transformers.
        gpus: Processes, one a GPU; several shard the model by FSDP2.
        rows: Responses of a generation, on each GPU.
        micro_batch: Responses of a training pass, on each GPU.
        accumulation: Micro-batches of an update.
        group: Responses to a prompt.
        images, image_tokens: Of every prompt: how many, and tokens of each.
        text_tokens: Of every prompt beside them.
        response_tokens: The longest.
        dtype: Of the weights as they are loaded, such as "float32".
        precision: "bf16", "fp16" or "no" for mixed precision.
        attention: "sdpa", "flash_attention_2", ...
        checkpointing: Whether activations are computed again in the backward.
        lora: Options of `peft.LoraConfig`; None trains the whole model.
        optimizer: One of `OPTIMIZERS`.
        divergence: Of the scoring; None where nothing is scored.
        draws: Perturbed views that a token's dependency is the mean of.
        sharing, scoring_memory: `prefix_sharing`, and bytes.
        own_views: Whether every rollout has a perturbed view of its own.
        old_pass: Whether a generation's log-probabilities are computed before it is trained on.
        reference: Whether a reference model is held.
        sharding: Of several GPUs.
        sampler: Where responses come from.
    """

    config: Any
    gpus: int
    rows: int
    micro_batch: int
    accumulation: int
    group: int
    images: int = 1
    image_tokens: int
    text_tokens: int = TEXT_TOKENS
    response_tokens: int
    dtype: str = "float32"
    precision: str = "bf16"
    attention: str = "sdpa"
    checkpointing: bool = True
    lora: dict[str, Any] | None = None
    optimizer: str = "adamw_torch_fused"
    divergence: str | None = "kl"
    draws: int = 1
    sharing: str = "auto"
    scoring_memory: int = 4 * GIB
    own_views: bool = False
    old_pass: bool = True
    reference: bool = False
    sharding: Sharding = field(default_factory=Sharding)
    sampler: Sampler

    def __post_init__(self) -> None:
        for name in ("gpus", "rows", "micro_batch", "accumulation", "group", "response_tokens", "text_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}, takes a number of at least 1")
        if self.images < 0 or (self.images and self.image_tokens < 1):
            raise InputError(f"images: got {self.images} of {self.image_tokens} tokens, takes numbers of at least 1")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"optim: got {self.optimizer!r}, a plan takes one of {list(OPTIMIZERS)}")

    @property
    def prompt_tokens(self) -> int:
        """Of the whole prompt."""
        return self.text_tokens + self.images * self.image_tokens

    @property
    def updates(self) -> int:
        """Of a generation."""
        return max(1, self.rows // (self.micro_batch * self.accumulation))

    def with_micro_batch(self, size: int) -> Settings:
        """The same update in micro-batches of another size."""
        return replace(self, micro_batch=size, accumulation=self.micro_batch * self.accumulation // size)


def model_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """A model's configuration: from a folder, from a `config.json`, of `presets`, or from the hub.

    Raises:
        InputError: There is none, or the model takes no images.
    """
    from transformers import AutoConfig

    own = None if Path(model).exists() else preset(model)
    try:
        if own is not None:
            config: Any = AutoConfig.for_model(own.pop("model_type"), **own)
        else:
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model: {model}: no configuration could be loaded: {str(error).splitlines()[0]} A plan takes a folder or "
            f"a file with one, a name on the hub, or one of {list(NAMES)}"
        ) from error
    vision = getattr(config, "vision_config", None)
    if vision is None or not hasattr(vision, "spatial_merge_size") or not hasattr(config, "image_token_id"):
        raise InputError(
            f"model: {model} is of type {config.model_type!r}; a plan takes models whose images are cut into patches "
            "as Qwen's are (qwen2_vl, qwen2_5_vl, qwen3_vl)"
        )
    return config


def image_tokens(config: Any, pixels: int) -> int:
    """Tokens of an image of so many pixels."""
    vision = config.vision_config
    return max(1, pixels // (vision.patch_size * vision.spatial_merge_size) ** 2)


def read_accelerate(path: str | Path) -> dict[str, Any]:
    """What a file of `accelerate config` says.

    Returns:
        Fields of `Settings`: `sharding`, and where the file says them `gpus` and `precision`.

    Raises:
        InputError: It cannot be read, or shards in another way than FSDP2.
    """
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as accelerate's config: {error}") from error
    if not isinstance(given, dict) or "distributed_type" not in given:
        raise InputError(f"{path}: takes a file as accelerate config writes it, with distributed_type")
    kind, options = given["distributed_type"], given.get("fsdp_config") or {}
    if not isinstance(options, dict):
        raise InputError(f"{path}: fsdp_config: got {options!r}, takes keys and values")
    if kind != "FSDP" or options.get("fsdp_version") != 2:
        got = f"{kind} with fsdp_version {options.get('fsdp_version', 1)}" if kind == "FSDP" else kind
        raise InputError(f"{path}: distributed_type: got {got}, a plan takes FSDP with fsdp_version: 2")
    found: dict[str, Any] = {
        "sharding": Sharding(
            layers=options.get("fsdp_auto_wrap_policy") == "TRANSFORMER_BASED_WRAP",
            reshard=bool(options.get("fsdp_reshard_after_forward", True)),
            offload=bool(options.get("fsdp_offload_params", False)),
        )
    }
    if "num_processes" in given:
        count = given["num_processes"]
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"{path}: num_processes: got {count!r}, takes a whole number from 1")
        found["gpus"] = count
    if given.get("mixed_precision") in ("bf16", "fp16"):
        found["precision"] = given["mixed_precision"]
    return found


def arguments(config: dict[str, Any], gpus: int) -> tuple[Any, Any, Any]:
    """What `vppo.train_config.make_arguments` makes of a config in one of so many processes, wherever it is asked.

    Raises:
        InputError: As `make_arguments`; and where a generation cannot be divided among the processes.
    """
    from vppo.config import VPPOConfig
    from vppo.train_config import make_arguments

    def of(name: str) -> Any:
        return config.get(name) or VPPOConfig.__dataclass_fields__[name].default

    batch, group = of("per_device_train_batch_size"), of("num_generations")
    steps = of("steps_per_generation") or of("gradient_accumulation_steps")
    rows = of("generation_batch_size") or batch * gpus * steps
    if rows % (batch * gpus) or rows % group:
        raise InputError(
            f"generation_batch_size: got {rows}, takes a multiple of per_device_train_batch_size x GPUs = "
            f"{batch} x {gpus} and of num_generations = {group}"
        )
    here = {**config, "generation_batch_size": rows, "steps_per_generation": None}
    # a GPU's run, also on a machine without one
    return make_arguments({**here, "use_cpu": True, "bf16": False, "fp16": False})


def from_config(
    config: dict[str, Any], *, gpus: int, accelerate: dict[str, Any] | None = None, **changes: Any
) -> Settings:
    """Settings of a training config.

    Args:
        config: What `vppo.train_config.load_config` returns.
        gpus: Processes.
        accelerate: Of `read_accelerate`; without it FSDP2 shards every layer.
        **changes: Fields of `Settings` that the config does not tell: `text_tokens`, `images`, `image_tokens`.

    Raises:
        InputError: A value is out of its range.
    """
    from trl import get_peft_config

    known = dict(accelerate or {})
    if known.pop("gpus", gpus) != gpus:
        raise InputError(f"--gpus: got {gpus}, the file for accelerate has num_processes: {(accelerate or {})['gpus']}")
    script, model_args, args = arguments(config, gpus)
    if args.method.penalizes:
        raise InputError(
            f"algorithm: got {args.algorithm!r}, which trains on two views; a plan takes those that do on one"
        )
    model = model_config(script.model, trust_remote_code=args.trust_remote_code)
    precision = "fp16" if config.get("fp16") else "bf16" if config.get("bf16", True) else "no"
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    rows = args.generation_batch_size // gpus
    every = rows // batch * args.num_iterations
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    peft: Any = get_peft_config(model_args)
    sharding = known.pop("sharding", Sharding())
    accelerator: Any = args.accelerator_config
    plugin = getattr(accelerator, "gradient_accumulation_kwargs", None) or {}
    response = int(args.max_completion_length or 256)
    pixels = script.max_pixels or default_pixels(script.model)
    chosen: dict[str, Any] = {"precision": precision, **known, **changes}
    if chosen.get("image_tokens") is None:
        chosen["image_tokens"] = image_tokens(model, pixels)
    chosen = {name: value for name, value in chosen.items() if value is not None}
    images, text = chosen.get("images", 1), chosen.get("text_tokens", TEXT_TOKENS)
    length = args.vllm_max_model_length or text + images * chosen["image_tokens"] + response
    kind = {"colocate": "vllm", "server": "server"}[args.vllm_mode] if args.use_vllm else "model"
    return Settings(
        config=model,
        gpus=gpus,
        rows=rows,
        micro_batch=batch,
        accumulation=accumulation,
        group=args.num_generations,
        response_tokens=response,
        dtype=_dtype(args.model_init_kwargs["dtype"], model),
        attention=model_args.attn_implementation or "sdpa",
        checkpointing=bool(args.gradient_checkpointing),
        lora=None if peft is None else {"r": peft.r, "lora_alpha": peft.lora_alpha, "target": peft.target_modules},
        optimizer=str(getattr(args.optim, "value", args.optim)),
        divergence=str(args.divergence) if args.perturbs else None,
        draws=args.draws,
        sharing=args.prefix_sharing if args.tas_statistics != "micro-batch" else "off",
        scoring_memory=int(args.scoring_memory * GIB),
        own_views=args.perturbation_scope == "rollout",
        old_pass=bool(accumulation % every or corrected),
        reference=args.beta != 0 and peft is None,
        sharding=replace(sharding, sync=bool(plugin.get("sync_each_batch"))),
        sampler=Sampler(
            kind=kind,
            share=float(args.vllm_gpu_memory_utilization),
            gpus=int(args.vllm_tensor_parallel_size),
            sleeps=bool(args.vllm_enable_sleep_mode),
            length=length,
        ),
        **chosen,
    )


def default_pixels(model: str) -> int:
    """Pixels of the largest image where the config does not say: the processor's limit, or Qwen's, 16,384 tokens."""
    import json

    path = Path(model) / "preprocessor_config.json"
    if path.is_file():
        given = json.loads(path.read_text(encoding="utf-8"))
        found = given.get("max_pixels") or (given.get("size") or {}).get("longest_edge")
        if isinstance(found, int):
            return found
    return 16384 * 28 * 28


def _dtype(given: Any, config: Any) -> str:
    """Name of the weights' dtype; "auto" is the checkpoint's own."""
    name = str(given if given not in (None, "auto") else getattr(config, "dtype", None) or "float32")
    return name.removeprefix("torch.")


def divisors(number: int) -> list[int]:
    """All of them, smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]


def gib(size: float) -> float:
    return size / GIB if math.isfinite(size) else size
