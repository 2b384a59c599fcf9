"""The peaks of a whole model from a few layers of it: every layer more takes the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vppo.plan.memory import ORDER, Peak
from vppo.plan.model import Depth, period
from vppo.plan.settings import Settings, divisors
from vppo.plan.simulation import EDGE, PHASES, Simulated, simulate


@dataclass(frozen=True)
class Estimate:
    """What a step needs of one GPU.

    Attributes:
        settings: Of the run.
        peaks: Bytes by category at the peak of each of `PHASES`; without scoring, of the others.
        products: Floating-point operations of a generation: its scoring, and all of its updates.
        parameters, trained: Of the whole model.
    """

    settings: Settings
    peaks: dict[str, Peak]
    products: dict[str, float]
    parameters: float
    trained: float

    @property
    def peak(self) -> float:
        """Bytes of the hungriest phase."""
        return max(sum(peak.values()) for peak in self.peaks.values())


def estimate(settings: Settings, scoring: bool = True) -> Estimate:
    """Simulates one step; on wish without what precedes its training.

    A model whose layers are many is simulated with few: once, and once more with one more layer in each of its two
    stacks. Both ends of a stack are places of their own, the layers between lie on a straight line between them.

    Raises:
        InputError: This process belongs to a group of processes.
    """
    return _summary(settings, _whole(settings, scoring))


def _whole(settings: Settings, scoring: bool) -> Simulated:
    config, full = settings.config, Depth.of(settings.config)
    deep = len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())
    repeat = period(config)
    # places of their own: the ends, and layers that take what the vision tower has left for them
    text = _few(full.text, -(-(2 * EDGE + deep) // repeat) * repeat, repeat)
    vision = _few(full.vision, 2 * EDGE + deep, 1)
    base = simulate(settings, Depth(text, vision), scoring)
    found = base
    if text < full.text:
        more = simulate(settings, Depth(text + repeat, vision), scoring)
        found = _along(found, base, more, (full.text - text) / repeat)
    if vision < full.vision:
        more = simulate(settings, Depth(text, vision + 1), scoring)
        found = _along(found, base, more, full.vision - vision)
    return found


def _few(layers: int, few: int, repeat: int) -> int:
    """Of how many layers the first simulation is: of all, or of few that differ from all by whole repeats."""
    few += (layers - few) % repeat
    return layers if layers <= few + repeat else few


def _along(found: Simulated, base: Simulated, more: Simulated, times: float) -> Simulated:
    """What is found, and so many times the difference of two simulations."""
    peaks = {
        place: {
            name: found.peaks[place].get(name, 0) + times * (more.peaks[place].get(name, 0) - peak.get(name, 0))
            for name in ORDER
        }
        for place, peak in base.peaks.items()
        if place in more.peaks
    }
    products = {
        name: found.products[name] + times * (more.products[name] - number) for name, number in base.products.items()
    }
    parameters: Any = tuple(
        c + times * (b - a) for a, b, c in zip(base.parameters, more.parameters, found.parameters, strict=True)
    )
    return Simulated(peaks, products, parameters)


def _summary(settings: Settings, simulated: Simulated) -> Estimate:
    peaks: dict[str, Peak] = {}
    for place, peak in simulated.peaks.items():
        phase = place[0]
        if phase in PHASES and sum(peak.values()) > sum(peaks.get(phase, {}).values()):
            peaks[phase] = {name: peak.get(name, 0.0) for name in ORDER}
    parameters, trained = simulated.parameters
    if settings.reference:  # sharded as the model is, and never trained
        held = peaks["optimizer"]["weights"]
        peaks = {phase: {**peak, "weights": peak["weights"] + held} for phase, peak in peaks.items()}
    if settings.sharding.offload and settings.gpus > 1:  # shards, their gradients and the optimizer are on the CPU
        away = {"weights": 0.0, "optimizer": 0.0}
        peaks = {phase: {**peak, **away} for phase, peak in peaks.items()}
    count = settings.updates * settings.accumulation
    training = simulated.products["training pass"] * count
    # a backward is two forwards, and a third where activations are computed again
    old = training / (4 if settings.checkpointing else 3) if settings.old_pass else 0.0
    products = {"scoring": simulated.products.get("scoring", 0.0) + old, "training": training}
    order = {phase: peaks[phase] for phase in PHASES if phase in peaks}
    return Estimate(settings, order, products, parameters, trained)


def largest_micro_batch(settings: Settings, room: float, known: Estimate | None = None) -> int | None:
    """The largest micro-batch of the same update whose training pass fits.

    Args:
        settings: Of the run.
        room: Bytes of a GPU that training may take.
        known: The estimate of these settings, where it is there.

    Returns:
        Responses; None where not even one fits.
    """
    sizes = divisors(settings.micro_batch * settings.accumulation)
    fits = {settings.micro_batch: sum(known.peaks["training pass"].values()) <= room} if known else {}

    def fit(size: int) -> bool:
        if size not in fits:
            found = estimate(settings.with_micro_batch(size), scoring=False)
            fits[size] = sum(found.peaks["training pass"].values()) <= room
        return fits[size]

    # outwards from what is asked for: nobody asks for a micro-batch far from what fits
    index = sizes.index(settings.micro_batch)
    if fit(sizes[index]):
        while index + 1 < len(sizes) and fit(sizes[index + 1]):
            index += 1
        return sizes[index]
    while index and not fit(sizes[index - 1]):
        index -= 1
    return sizes[index - 1] if index else None
