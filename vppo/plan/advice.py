"""Whether a step fits, and what to change where it does not."""

from __future__ import annotations

from vppo.plan.estimate import Estimate
from vppo.plan.sampler import SamplerMemory
from vppo.prefix_sharing import GIB


def advice(found: Estimate, sampler: SamplerMemory, room: float, largest: int | None) -> list[str]:
    """Sentences, the first of which says whether it fits.

    Args:
        found: Of the step.
        sampler: Of the same run.
        room: Bytes of a GPU that training may take.
        largest: Of `largest_micro_batch`.
    """
    settings = found.settings
    sizes = {phase: sum(peak.values()) for phase, peak in found.peaks.items()}
    worst = max(sizes, key=lambda phase: sizes[phase])
    size = settings.micro_batch
    sentences: list[str] = []
    if sizes[worst] <= room:
        more = "" if largest in (None, size) else f", and would with {_micro_batch(found, largest)}"
        sentences.append(f"It fits: {_gib(sizes[worst])} of {_gib(room)} in the {worst}{more}.")
    else:
        sentences.append(f"It does not fit: the {worst} takes {_gib(sizes[worst])}, and has {_gib(room)}.")
        for phase in (phase for phase in found.peaks if sizes[phase] > room):
            sentences += _changes(found, phase, room, largest)
        if sampler.held:
            sentences.append(
                f"vllm_enable_sleep_mode: true gives training the {_gib(sampler.held)} that vLLM holds; vllm_mode: "
                "server has GPUs of its own."
            )
    if not sampler.fits:
        sentences.append(_sampler(found, sampler))
    return list(dict.fromkeys(sentences))


def _changes(found: Estimate, phase: str, room: float, largest: int | None) -> list[str]:
    settings, peak = found.settings, found.peaks[phase]
    several, sharding = settings.gpus > 1, settings.sharding
    sentences: list[str] = []
    if phase == "training pass":
        if several and settings.accumulation > 1 and not sharding.sync:
            sentences.append(
                f"Each GPU adds up whole gradients over micro-batches, {_gib(peak['gradients'])}; accelerator_config: "
                "{gradient_accumulation_kwargs: {sync_each_batch: true}} keeps its own share alone."
            )
        if not settings.checkpointing:
            sentences.append(
                f"gradient_checkpointing: true computes activations again; {_gib(peak['activations'])} are held."
            )
    if several and not sharding.layers:
        sentences.append(
            "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP gathers a layer at a time; now "
            f"{_gib(peak['gathered weights'])} of weights are gathered at once."
        )
    elif several and not sharding.reshard:
        sentences.append(
            f"fsdp_reshard_after_forward: true lets a layer's weights go; {_gib(peak['gathered weights'])} are held."
        )
    if phase == "training pass" and largest is not None and largest != settings.micro_batch:
        sentences.append(f"It fits with {_micro_batch(found, largest)}.")
    if phase == "scoring" and peak["activations"] > 0.1 * room:
        half = max(settings.scoring_memory / 2 / GIB, 0.5)
        sentences.append(f"scoring_memory: {half:g} scores fewer rows at a time; {_gib(peak['activations'])} are held.")
    if peak["rollouts"] > 0.1 * room:
        sentences.append(
            f"The rollouts' images take {_gib(peak['rollouts'])}: a smaller generation_batch_size or max_pixels."
        )
    fixed = peak["weights"] + peak["optimizer"] + peak["gradients"]
    if fixed > 0.5 * room and not (phase == "training pass" and several and not sharding.sync):
        ways = ["more GPUs" if several else "several GPUs, which share them"]
        ways += [] if settings.lora else ["LoRA (use_peft: true)"]
        ways += ["fsdp_offload_params: true"] if several and not sharding.offload else []
        sentences.append(f"Weights, gradients and optimizer take {_gib(fixed)}: {', or '.join(ways)}.")
    return sentences


def _micro_batch(found: Estimate, size: int | None) -> str:
    assert size is not None
    other = found.settings.with_micro_batch(size)
    return (
        f"per_device_train_batch_size: {found.settings.micro_batch} -> {size} and gradient_accumulation_steps: "
        f"{found.settings.accumulation} -> {other.accumulation}"
    )


def _sampler(found: Estimate, memory: SamplerMemory) -> str:
    sampler = found.settings.sampler
    if sampler.kind == "server":
        return f"vLLM does not fit: on {memory.gpus} GPUs its weights take {_gib(memory.weights)} of each."
    return (
        f"vLLM does not fit: of vllm_gpu_memory_utilization: {sampler.share:g} its weights take "
        f"{_gib(memory.weights)}, and {_gib(memory.cache)} are left for a row of {sampler.length} tokens; a larger "
        f"share, or vllm_tensor_parallel_size: {2 * memory.gpus}."
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
