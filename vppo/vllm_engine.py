"""What a run needs of vLLM: a version that TRL supports, the trainer's image limits, and a server that answers."""

from __future__ import annotations

import json
import time
from http.client import HTTPException
from importlib import metadata
from typing import Any
from urllib.request import urlopen

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vppo.errors import InputError
from vppo.loading import load_processor

CONNECT = 5.0  # seconds until a connection must stand
SILENCE = 45  # seconds after which a server whose machine no longer answers is given up
RETRIES = 4  # of a failed request, after 0, 2, 4 and 8 s
NAMES = {"image_processor_type", "processor_class", "_processor_class", "auto_map"}  # of classes: no settings


def supported() -> SpecifierSet:
    """The versions of vLLM that the installed TRL supports, as its package says."""
    wanted = map(Requirement, metadata.requires("trl") or [])
    return next((each.specifier for each in wanted if each.name == "vllm"), SpecifierSet())


def installed() -> str | None:
    """The version of vLLM that is installed, under whatever name: builds for CPUs have their own."""
    names = metadata.packages_distributions().get("vllm", [])
    return metadata.version(names[0]) if names else None


def check_version() -> None:
    """Raises an `InputError` where vLLM is missing, or not of a version that TRL supports."""
    versions, found = supported(), installed()
    limits = ",".join(sorted(map(str, versions), reverse=True))
    command = f"pip install 'vllm{limits}'"
    if found is None:
        raise InputError(f"use_vllm: vLLM is not installed: {command}")
    if not versions.contains(Version(found).base_version, prereleases=True):
        raise InputError(
            f"use_vllm: found vLLM {found}, and TRL {metadata.version('trl')} supports {limits}: {command}"
        )


def image_limits(processor: Any) -> dict[str, int]:
    """ "min_pixels" and "max_pixels" of a processor like Qwen's, whose two edges are counts of pixels; else nothing."""
    image_processor: Any = getattr(processor, "image_processor", None)
    if not hasattr(image_processor, "merge_size"):
        return {}
    size = image_processor.size
    return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}


def image_options(model: str, processor: Any, **options: Any) -> dict[str, int]:
    """What vLLM's own image processor must be told to make the same of an image as the trainer's.

    Args:
        model: Where vLLM loads the model, and its processor, from.
        processor: The trainer's.
        **options: "revision" and "trust_remote_code", as `vppo.loading.load_processor` takes them.

    Returns:
        `image_limits` where they are not those of the model's folder, else nothing.

    Raises:
        InputError: The two differ in something that vLLM cannot be told.
    """
    if getattr(processor, "image_processor", None) is None:
        return {}
    saved = load_processor(model, **options).image_processor.to_dict()
    given = processor.image_processor.to_dict()
    differ = {name for name in saved.keys() & given.keys() - NAMES if saved[name] != given[name]}
    limits = image_limits(processor)
    if differ - ({"size"} if limits else set()):
        raise InputError(
            f"processing_class: {', '.join(sorted(differ))}: vLLM reads its image processor from {model}, where other "
            "values are saved, and cannot be told these; save the processor into a copy of the model's folder"
        )
    return limits if differ else {}


# -- a server ----------------------------------------------------------------------------------------------------------


def server_url(args: Any) -> str:
    """Where the server of a run is.

    Args:
        args: TRL's `GRPOConfig`.
    """
    return str(args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}").rstrip("/")


def answers(url: str, patience: float) -> bool:
    """Whether a server is there and well.

    Args:
        url: Of the server.
        patience: Seconds to wait for it.
    """
    end = time.monotonic() + patience
    while _ask(f"{url}/health") is None:
        if time.monotonic() >= end:
            return False
        time.sleep(min(2.0, max(end - time.monotonic(), 0.0)))
    return True


def _ask(url: str, timeout: float = CONNECT) -> bytes | None:
    """The body of a good answer, or None."""
    try:
        with urlopen(url, timeout=timeout) as answer:
            return answer.read()
    except (OSError, HTTPException):  # refused, silent, or an answer that is no good one
        return None


def check_server(args: Any, limits: dict[str, int], differ: bool) -> None:
    """Waits for the server and compares its image limits; on every process, so that none waits for another.

    Args:
        args: TRL's `GRPOConfig`.
        limits: `image_limits` of the trainer.
        differ: Whether they are not those of the model's folder.

    Raises:
        InputError: It does not answer within `vllm_server_timeout`, or makes something else of images.
    """
    url = server_url(args)
    if not answers(url, args.vllm_server_timeout):
        raise InputError(
            f"vllm_server_base_url: {url}: no vLLM server has answered within {args.vllm_server_timeout:g} s: start "
            "it, or set vllm_server_timeout higher for one that is still loading its model"
        )
    info = _server_info(args)
    if info is None:
        return  # TRL says what is missing
    settings = info["model_config"].get("multimodal_config") or {}
    told = {k: v for k, v in (settings.get("mm_processor_kwargs") or {}).items() if k in limits}
    if told != limits if told else differ:
        raise InputError(
            f"min_pixels, max_pixels: the vLLM server at {url} has the image limits {told or 'of its model'}, the "
            f"trainer has {limits}: restart it with --mm-processor-kwargs '{json.dumps(limits)}'"
        )


def server_dtype(args: Any) -> str | None:
    """What a server computes in, if it says.

    Args:
        args: TRL's `GRPOConfig`.
    """
    info = _server_info(args)
    return None if info is None else str(info["model_config"].get("dtype"))


def _server_info(args: Any) -> dict[str, Any] | None:
    # vLLM looks for all that is installed before it answers
    answer = _ask(f"{server_url(args)}/server_info?config_format=json", timeout=60.0)
    return None if answer is None else json.loads(answer)["vllm_config"]


def notice_silence(session: Any) -> None:
    """Lets a client's requests fail within a minute where the server is gone, however long an answer may take.

    Args:
        session: A `requests.Session`.
    """
    import socket

    from requests.adapters import HTTPAdapter
    from urllib3.connection import HTTPConnection
    from urllib3.util.retry import Retry

    probes = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", SILENCE // 3), ("TCP_KEEPINTVL", SILENCE // 9), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):  # Linux
            probes.append((socket.IPPROTO_TCP, getattr(socket, name), value))

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> Any:
            options = [*HTTPConnection.default_socket_options, *probes]
            return super().init_poolmanager(*args, **kwargs, socket_options=options)

        def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            return super().send(request, *args, **{**kwargs, "timeout": kwargs.get("timeout") or (CONNECT, None)})

    retry = Retry(total=RETRIES, backoff_factor=1, status_forcelist=[500, 502, 503], allowed_methods=["POST", "GET"])
    for scheme in ("http://", "https://"):
        pool = session.adapters[scheme]._pool_maxsize
        session.mount(scheme, Adapter(max_retries=retry, pool_maxsize=pool))
