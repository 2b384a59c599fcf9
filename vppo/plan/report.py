"""A plan as a person reads it: a table, a picture, and sentences."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vppo.files import make_folder, write_atomic
from vppo.plan.advice import advice
from vppo.plan.estimate import Estimate
from vppo.plan.memory import ORDER
from vppo.plan.sampler import SamplerMemory
from vppo.prefix_sharing import GIB

if TYPE_CHECKING:
    from vppo.pages.plot import Plot

EFFICIENCY = (0.5, 0.2)  # shares of a GPU's rate: the fastest and the slowest that a step's range of time is made of


@dataclass(frozen=True)
class Report:
    """A plan.

    Attributes:
        found: What a step takes.
        sampler: What its sampler takes.
        gpu_memory, reserve: Bytes of a GPU, and those that nothing planned may take.
        largest: Of `largest_micro_batch`; None where none fits.
        teraflops: Of a GPU, 10^12 operations a second.
    """

    found: Estimate
    sampler: SamplerMemory
    gpu_memory: float
    reserve: float
    largest: int | None
    teraflops: float

    @property
    def room(self) -> float:
        """Bytes that training may take."""
        return self.gpu_memory - self.reserve - self.sampler.held

    @property
    def fits(self) -> bool:
        return self.found.peak <= self.room and self.sampler.fits

    @property
    def seconds(self) -> dict[str, tuple[float, float]]:
        """From, to: of all scoring and of all updates of a generation."""
        rates = [self.teraflops * 1e12 * share for share in EFFICIENCY]
        return {name: (count / rates[0], count / rates[1]) for name, count in self.found.products.items()}

    def sentences(self) -> list[str]:
        """Whether it fits, the sampler, the time, and what to change."""
        settings, sampler = self.found.settings, self.sampler
        first, *changes = advice(self.found, sampler, self.room, self.largest)
        where = {
            "vllm": f"vLLM on the trainer's GPUs, {settings.sampler.share:g} of each",
            "server": f"a vLLM server on GPUs of its own, at least {sampler.gpus}",
            "model": "the model's own generate, whose weights FSDP2 gathers (not planned)",
        }[settings.sampler.kind]
        cache = f"keys and values of {sampler.tokens:,.0f} tokens, {sampler.responses:,.0f} of the longest rows"
        low, high = (sum(pair) for pair in zip(*self.seconds.values(), strict=True))
        largest = "none fits" if self.largest is None else f"{self.largest} responses"
        return [
            first,
            *changes,
            f"Largest micro-batch that fits: {largest}.",
            f"Sampling: {where}: {sampler.weights / GIB:.1f} GiB of weights, {cache}.",
            f"Time of a generation's scoring and {settings.updates} updates, sampling apart: {low:,.0f} to {high:,.0f} "
            f"s, at {EFFICIENCY[0]:.0%} to {EFFICIENCY[1]:.0%} of {self.teraflops:g} TFLOPS (--tflops).",
        ]

    def print(self, console: Any) -> None:
        """The table and the sentences."""
        from rich.table import Table

        settings = self.found.settings
        text = settings.config.get_text_config()
        console.print(
            f"{settings.config.model_type}, {self.found.parameters / 1e9:.2f} billion weights, "
            f"{self.found.trained / 1e9:.2f} trained; {text.num_hidden_layers} layers of {text.hidden_size}; "
            f"{settings.gpus} GPUs of {self.gpu_memory / GIB:g} GiB, {self.reserve / GIB:.1f} of them kept free. "
            f"Rows of {settings.prompt_tokens} + {settings.response_tokens} tokens, {settings.rows} a GPU; micro-batch "
            f"{settings.micro_batch} x {settings.accumulation}.",
            highlight=False,
        )
        table = Table("GiB of a GPU", *self.found.peaks)
        for name in ORDER:
            table.add_row(name, *(f"{peak[name] / GIB:.2f}" for peak in self.found.peaks.values()))
        table.add_section()
        totals = [sum(peak.values()) for peak in self.found.peaks.values()]
        table.add_row("together", *(f"{total / GIB:.2f}" for total in totals))
        table.add_row("held by vLLM", *(f"{self.sampler.held / GIB:.2f}" for _ in totals))
        table.add_row("left", *(f"{(self.room - total) / GIB:.2f}" for total in totals))
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)
        for sentence in self.sentences():
            console.print(sentence, highlight=False, markup=False)

    def picture(self) -> Plot:
        """A bar for each phase, in the colours of the pages."""
        from matplotlib.figure import Figure

        from vppo.pages.plot import Plot, prepare
        from vppo.pages.theme import Theme, series_colours

        phases = list(self.found.peaks)
        parts = [name for name in ORDER if any(peak[name] for peak in self.found.peaks.values())]

        def draw(figure: Figure, theme: Theme) -> None:
            ax = prepare(figure.subplots(), "Memory of a GPU")
            left = [0.0] * len(phases)
            orange, blue, green, purple, _, _, teal, _ = series_colours(theme, 8)
            shades = {
                "weights": (blue, 1.0),
                "gathered weights": (blue, 0.5),
                "gradients": (green, 1.0),
                "optimizer": (purple, 1.0),
                "rollouts": (teal, 1.0),
                "activations": (orange, 1.0),
                "held by vLLM": (theme.faint, 1.0),
            }
            for name in [*parts, "held by vLLM"]:
                sizes = [self.found.peaks[phase].get(name, self.sampler.held) / GIB for phase in phases]
                if not any(sizes):
                    continue
                colour, alpha = shades[name]
                ax.barh(phases, sizes, left=left, label=name, color=colour, alpha=alpha, height=0.6)
                left = [a + b for a, b in zip(left, sizes, strict=True)]
            limit = (self.gpu_memory - self.reserve) / GIB
            ax.axvline(limit, color=theme.ink, linewidth=1.0, linestyle=(0, (2, 2)))
            ax.set(xlabel="GiB; dashed: a GPU less its reserve", xlim=(0, max(limit, *left) * 1.05))
            ax.invert_yaxis()
            ax.grid(axis="x")
            ax.grid(visible=False, axis="y")
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=3)

        totals = ", ".join(f"{phase} {sum(self.found.peaks[phase].values()) / GIB:.1f} GiB" for phase in phases)
        return Plot("plan", "", f"Memory of a GPU by phase and category: {totals}.", draw, (6.4, 3.8))

    def save(self, folder: Path) -> None:
        """`plan.png`, and `plan.json` with every number in bytes, operations and seconds."""
        from vppo.pages.theme import LIGHT

        make_folder(folder)
        write_atomic(folder / "plan.png", self.picture().png(LIGHT))
        numbers = {
            "fits": self.fits,
            "peaks": self.found.peaks,
            "room": self.room,
            "largest_micro_batch": self.largest,
            "parameters": self.found.parameters,
            "operations": self.found.products,
            "seconds": self.seconds,
            "sampler": vars(self.sampler),
            "sentences": self.sentences(),
        }
        write_atomic(folder / "plan.json", json.dumps(numbers, indent=1))
