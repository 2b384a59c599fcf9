"""How an evaluation is run: two published ways to do it, as presets of every knob that could change a number."""

from __future__ import annotations

from typing import Any

from vppo.data import INSTRUCTION, SYSTEM_PROMPT

# what is not asked for by name comes from here; a knob given by name wins
PROTOCOLS: dict[str, dict[str, Any]] = {
    # As the paper writes: eight samples at temperature 1, top-p 1, 2048 new tokens, the last box, no judge. Where it is
    # silent, as it trains: no top-k, images of 200,704 to 1,003,520 pixels.
    "paper": {
        "samples": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": 2048,
        "min_pixels": 200_704,
        "max_pixels": 1_003_520,
        "graders": ("math-verify",),
        "system_prompt": SYSTEM_PROMPT,
        "instruction": INSTRUCTION,
    },
    # As PAPO-Eval runs, the code that both papers evaluate with: it leaves LLaMA-Factory's top-k 50 and image sizes in
    # force, and grades by mathruler.
    "papo": {
        "samples": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
        "max_tokens": 2048,
        "min_pixels": 32 * 32,
        "max_pixels": 768 * 768,
        "graders": ("mathruler", "math-verify"),
        "system_prompt": SYSTEM_PROMPT,
        "instruction": INSTRUCTION,
    },
}
