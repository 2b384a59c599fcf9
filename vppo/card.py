"""The model card of a run: which method was really run, whose it is, and how the model is asked about an image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vppo.config import VPPOConfig


PAPERS = {  # of `vppo.algorithms.Algorithm.paper`
    "vppo": {
        "title": "Spotlight on Token Perception for Multimodal Reinforcement Learning",
        "id": "2510.09285",
        "citation": """\
@inproceedings{huang2026spotlight,
    title        = {{Spotlight on Token Perception for Multimodal Reinforcement Learning}},
    author       = {Siyuan Huang and Xiaoye Qu and Yafu Li and Yun Luo and Zefeng He and Daizong Liu and Yu Cheng},
    booktitle    = {International Conference on Learning Representations},
    year         = 2026,
    eprint       = {arXiv:2510.09285},
}""",
    },
    "papo": {
        "title": "Perception-Aware Policy Optimization for Multimodal Reasoning",
        "id": "2507.06448",
        "citation": """\
@article{wang2025papo,
    title        = {{Perception-Aware Policy Optimization for Multimodal Reasoning}},
    author       = {Zhenhailong Wang and Xuehang Guo and Sofia Stoica and Haiyang Xu and Hongru Wang and others},
    year         = 2025,
    eprint       = {arXiv:2507.06448},
}""",
    },
    "pgpo": {
        "title": "Not All Tokens See Equally: Perception-Grounded Policy Optimization for Large Vision-Language Models",
        "id": "2604.01840",
        "citation": """\
@article{ye2026pgpo,
    title        = {{Not All Tokens See Equally: Perception-Grounded Policy Optimization for Large Vision-Language
                    Models}},
    author       = {Zekai Ye and Qiming Li and Xiaocheng Feng and Ruihan Chen and Ziming Li and others},
    year         = 2026,
    eprint       = {arXiv:2604.01840},
}""",
    },
    "vepo": {
        "title": "Entropy Is Not Enough: Unlocking Effective Reinforcement Learning for Visual Reasoning via "
        "Vision-Anchored Token Selection",
        "id": "2606.03937",
        "citation": """\
@article{jin2026vepo,
    title        = {{Entropy Is Not Enough: Unlocking Effective Reinforcement Learning for Visual Reasoning via
                    Vision-Anchored Token Selection}},
    author       = {Senjie Jin and Peixin Wang and Boyang Liu and Xiaoran Fan and Shuo Li and others},
    year         = 2026,
    eprint       = {arXiv:2606.03937},
}""",
    },
    "dapo": {
        "title": "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
        "id": "2503.14476",
        "citation": """\
@article{yu2025dapo,
    title        = {{DAPO: An Open-Source LLM Reinforcement Learning System at Scale}},
    author       = {Qiying Yu and Zheng Zhang and Ruofei Zhu and Yufeng Yuan and others},
    year         = 2025,
    eprint       = {arXiv:2503.14476},
}""",
    },
}
BASE = re.compile(r"This model is a fine-tuned version of \[(.*?)\]\(https://huggingface\.co/.*?\)")
QUICK_START = re.compile(r"## Quick start\n.*?(?=\n## )", re.DOTALL)
VERSIONS = "### Framework versions\n"


def corrected(text: str, config: Any, args: VPPOConfig, hub_model_id: str | None) -> str:
    """TRL's card of a run, told what TRL cannot know.

    Args:
        text: As TRL writes it.
        config: The model's; its `_name_or_path` is what training began with.
        args: Of the run.
        hub_model_id: Where the model will be on the hub, if anywhere.
    """
    base = Path(getattr(config, "_name_or_path", "") or "").name
    whose = f" version of `{base}`, a `{config.model_type}` model" if base else f" `{config.model_type}` model"
    text = BASE.sub(lambda found: found[0] if found[1] != "None" else f"This model is a fine-tuned{whose}", text)
    start = f"""\
## Quick start

```python
from transformers import pipeline

generator = pipeline("image-text-to-text", model="{hub_model_id or "path/to/this/model"}", device_map="auto")
content = [{{"type": "image", "url": "picture.png"}}, {{"type": "text", "text": "What does the picture show?"}}]
output = generator(text=[{{"role": "user", "content": content}}], max_new_tokens=512, return_full_text=False)[0]
print(output["generated_text"])
```
"""
    text = QUICK_START.sub(lambda _: start, text)
    return text.replace(VERSIONS, f"{_settings(args)}\n\n{VERSIONS}", 1)


def _settings(args: VPPOConfig) -> str:
    shown: dict[str, object] = {"algorithm": args.algorithm, "recipe": args.recipe, "loss_type": args.loss_type}
    if args.perturbs:
        shown |= {"divergence": args.divergence, "perturbation": args.perturbation}
    if args.scores_tokens:
        shown |= args.shaping
    shown |= {"epsilon": args.epsilon, "epsilon_high": args.epsilon_high, "num_generations": args.num_generations}
    values = {name: "null" if value is None else value for name, value in shown.items()}
    return "Its settings: " + ", ".join(f"`{name}: {value}`" for name, value in values.items()) + "."
