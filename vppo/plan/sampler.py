"""What a sampler takes of a GPU: its copy of the weights, and room for keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from vppo.plan.settings import Settings

OWN_SHARE = 0.9  # of its GPUs, what `trl vllm-serve` takes unless told


@dataclass(frozen=True)
class SamplerMemory:
    """On one GPU of the sampler's.

    Attributes:
        gpus: Over which a copy of the weights is spread.
        weights: Bytes of them on each.
        cache: Bytes left for keys and values; below 0 where not even the weights fit.
        tokens: That the cache holds, on all of these GPUs together.
        responses: Of the longest rows, as many at a time.
        held: Bytes that training does not have while it runs.
    """

    gpus: int
    weights: float
    cache: float
    tokens: float
    responses: float
    held: float

    @property
    def fits(self) -> bool:
        """Whether it can sample at all."""
        return self.responses >= 1


def token_bytes(settings: Settings) -> int:
    """Keys and values of a token in all layers, in 16 bits."""
    text = settings.config.get_text_config()
    heads = text.num_attention_heads
    pairs = getattr(text, "num_key_value_heads", None) or heads
    return 2 * 2 * text.num_hidden_layers * pairs * (getattr(text, "head_dim", None) or text.hidden_size // heads)


def sampler_memory(settings: Settings, parameters: float, gpu_memory: float) -> SamplerMemory:
    """What sampling takes.

    A server's GPUs are its own; where nobody says over how many it spreads its weights, as few as hold them beside one
    row. The model's own `generate` needs no copy; its keys and values are gone when training begins.

    Args:
        settings: Of the run.
        parameters: Of the whole model.
        gpu_memory: Bytes of a GPU.
    """
    sampler, each = settings.sampler, token_bytes(settings)
    if sampler.kind == "model":
        tokens = float(settings.rows * sampler.length)
        return SamplerMemory(1, 0.0, tokens * each, tokens, float(settings.rows), 0.0)
    server = sampler.kind == "server"
    share = OWN_SHARE if server else sampler.share
    counts = [1, 2, 4, 8] if server else [sampler.gpus]

    def spread(gpus: int) -> SamplerMemory:
        weights = 2 * parameters / gpus
        cache = share * gpu_memory - weights
        tokens = max(cache, 0.0) * gpus / each
        held = 0.0 if server or sampler.sleeps else share * gpu_memory
        return SamplerMemory(gpus, weights, cache, tokens, tokens / sampler.length, held)

    found = [spread(count) for count in counts]
    return next((memory for memory in found if memory.fits), found[-1])
