"""What vLLM's build for CPUs needs beside torch's: used by the tests alone, before vLLM is imported.

Also a program: `python cpu_engine.py serve ...` is `vllm serve ...` with the same.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than what it compiles
}


def prepare() -> None:
    """Lets vLLM be imported and keep the weights that a later update replaces."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    _let_torchvision_load()
    import torch
    import vllm.model_executor.layers.utils as layers
    import vllm.model_executor.models.registry as registry

    def plain_linear(layer: Any, remove_weight: bool) -> None:
        """vLLM's own packs the weights and drops those that `load_weights` writes to."""
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = plain_linear
    registry._run_in_subprocess = lambda function: function()  # a process of its own would have none of this


def _let_torchvision_load() -> None:
    """The index's torchvision is built for CUDA: beside torch for CPUs its library is missing, and so its operators.

    vLLM imports it and calls none of them.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        prepare.operators = torch.library.Library("torchvision", "DEF")  # type: ignore[attr-defined] # kept alive
        for name in ("nms", "qnms"):
            prepare.operators.define(  # type: ignore[attr-defined]
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        importlib.import_module("torchvision")


def save_for_vllm(model: Any, processor: Any, folder: Path) -> Path:
    """Saves a model as vLLM loads it: it asks Qwen's processors for videos, too."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    image_processor = processor.image_processor
    if hasattr(image_processor, "temporal_patch_size"):
        video = {name: value for name, value in image_processor.to_dict().items() if name != "image_processor_type"}
        kind = "Qwen3VL" if "Qwen3" in type(processor).__name__ else "Qwen2VL"
        video["video_processor_type"] = f"{kind}VideoProcessor"
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video, default=str))
    return folder


if __name__ in ("__main__", "__mp_main__"):  # the engine's own process imports this file by the second name
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    prepare()
if __name__ == "__main__":
    from importlib import metadata

    from vllm.entrypoints.cli.main import main

    version = metadata.version  # the command asks for its version under the name that the builds for GPUs have
    metadata.version = lambda name: version("vllm-cpu" if name == "vllm" else name)
    main()
