"""The model that an analysis looks at, and who samples its responses."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vppo.analysis.options import AnalysisOptions
from vppo.analysis.sampling import Sampler, end_tokens, with_transformers, with_vllm
from vppo.contents import PROCESSOR, WEIGHTS, digest, digest_folder, digest_model
from vppo.errors import InputError
from vppo.loading import check_device, load_model, load_processor
from vppo.prefix_sharing import GIB, ResponsePasses


class Subject:
    """The model that is looked at; its weights are loaded when they are needed.

    Args:
        model: A model on the hub, a folder, or a (model, processor) pair.
        options: How to load it.

    Attributes:
        name: What tables and figures call it.
        processor: Its processor.
        device: Where it computes.

    Raises:
        InputError: There is no such model, or no such device.
    """

    def __init__(self, model: str | Path | tuple[Any, Any], options: AnalysisOptions) -> None:
        self._options = options
        self._hub: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
        self._loaded: Any = None
        if isinstance(model, tuple):
            self._loaded, self.processor = model
            self.name = getattr(self._loaded, "name_or_path", "") or type(self._loaded).__name__
            self.device = str(self._loaded.device)
            return
        self.name = os.path.expanduser(str(model))
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device != "auto":
            check_device(self.device)
        self.processor = load_processor(
            self.name, min_pixels=options.min_pixels, max_pixels=options.max_pixels, **self._hub
        )

    @cached_property
    def model(self) -> Any:
        if self._loaded is not None:
            return self._loaded
        attention = self._options.attn_implementation
        return load_model(
            self.name, device=self.device, dtype=self._options.dtype, attn_implementation=attention, **self._hub
        )

    @cached_property
    def passes(self) -> ResponsePasses:
        return ResponsePasses(self.model, memory=int(self._options.memory * GIB))

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        return self._loaded.config if self._loaded else AutoConfig.from_pretrained(self.name, **self._hub)

    @cached_property
    def ends(self) -> list[int]:
        from transformers import GenerationConfig

        if self._loaded is not None:
            return end_tokens(self._loaded.generation_config, self.processor.tokenizer)
        try:
            stored = GenerationConfig.from_pretrained(self.name, revision=self._options.revision)
        except OSError:  # a model need not have one
            stored = None
        return end_tokens(stored, self.processor.tokenizer)

    def contents(self) -> dict[str, str]:
        """Fingerprints of the weights, and of what is loaded beside them: for a model on the hub, its commit."""
        if self._loaded is not None:
            parts = self._loaded.config, self.processor.image_processor
            settings = [*(part.to_json_string() for part in parts), self.processor.tokenizer.get_vocab()]
            return {"weights": digest_model(self._loaded), "processor": digest(settings)}
        folder = Path(self.name)
        if folder.is_dir():
            return {"weights": digest_folder(folder, WEIGHTS), "processor": digest_folder(folder, PROCESSOR)}
        from transformers.utils.hub import cached_file, extract_commit_hash

        file = cached_file(self.name, "config.json", revision=self._options.revision)
        commit = str(extract_commit_hash(file, None))
        return {"weights": commit, "processor": commit}

    @property
    def context(self) -> int | None:
        """The most tokens that the model takes, if it says."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def sampler(self) -> str:
        if self._options.sampler != "auto":
            return self._options.sampler
        there = self._loaded is None and importlib.util.find_spec("vllm") and torch.cuda.is_available()
        return "vllm" if there else "transformers"

    def sampling(self) -> AbstractContextManager[Sampler]:
        if self.sampler == "transformers":
            return nullcontext(with_transformers(self.model))
        if self._loaded is not None:
            raise InputError("sampler: got 'vllm', takes 'transformers' for a model in memory")
        limits = {name: getattr(self._options, name) for name in ("min_pixels", "max_pixels")}
        pixels = {name: value for name, value in limits.items() if value is not None}
        return with_vllm(self.name, self.processor, pixels, dtype=self._options.dtype, **self._hub)
