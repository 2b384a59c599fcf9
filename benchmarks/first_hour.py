"""The first hour on a GPU, in the order in which it proves most: what it takes, what is right, what is fast.

Every step is a process of its own and writes its JSON at once, so that a crash or the end of the lease costs only what
has not run. `make gpu` runs all of them; peers come last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vppo.files import write_atomic

PYTHON = sys.executable
ROOT = Path(__file__).resolve().parent.parent
SUITES = ("divergence", "loss", "logprob")
RESULTS = Path(__file__).parent / "results" / "first_hour"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def write(out: Path, name: str, content: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / f"{name}.json", json.dumps(content, indent=1) + "\n")


def steps(device: str, out: Path) -> list[tuple[str, list[str], int]]:
    """(name, command, seconds that it may take), in order. On a CPU, a rehearsal at sizes of seconds."""

    def own(name: str) -> list[str]:
        return [PYTHON, "-m", "benchmarks.first_hour", "step", name, "--device", device, "--out", str(out)]

    def suite(name: str, peers: str, presets: list[str], rows: list[int], seconds: float) -> list[str]:
        command = [PYTHON, "-m", "benchmarks", "run", name, "--device", device, "--peers", peers, "--time-wrong"]
        command += [part for preset in presets for part in ("--preset", preset)]
        return [*command, "--rows", *map(str, rows), "--seconds", str(seconds), "--out", str(out)]

    gpu = device == "cuda"
    presets, rows, seconds = (["7b", "32b"], [4096, 16_384], 2.0) if gpu else (["tiny"], [16], 0.05)
    tests = [PYTHON, "-m", "pytest", "-q", "-m", "gpu", f"--junit-xml={out / 'tests.xml'}"]
    if not gpu:
        tests += ["-k", "torch and far_views"]
    listed = [
        ("ceilings", own("ceilings"), 120),
        ("tests", tests, 300),
        ("tiles", own("tiles"), 150),
        ("fused", own("fused"), 150),
        *((f"ours, {name}", suite(name, "", presets, rows, seconds), 180) for name in SUITES),
        ("profile", own("profile"), 60),
        ("memory checker", own("memory_checker"), 120),
        ("demo", [str(Path(PYTHON).with_name("vppo")), "demo", "--device", device, "--out", str(out / "demo")], 240),
        ("step", suite("step", "", ["3b" if gpu else "demo"], [32 if gpu else 16], seconds), 180),
        *((f"peers, {name}", suite(name, "trl,liger,cce", presets, rows, seconds), 240) for name in SUITES),
    ]
    return listed if gpu else [step for step in listed if step[0] not in ("demo", "step")]


@app.command()
def run(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal.")] = "cuda",
    out: Annotated[Path, typer.Option(help="Folder for the JSON of every step.")] = RESULTS,
    minutes: Annotated[
        float, typer.Option(help="What begins later than this, or would last longer, is cut off.")
    ] = 28.0,
) -> None:
    """Run all steps. Ends with 1 if one of them failed."""
    out = out.resolve()
    end, done = time.monotonic() + 60 * minutes, list[dict[str, Any]]()
    environment = os.environ | {"VPPO_TEST_DEVICE": device}
    for name, command, limit in steps(device, out):
        begin = time.monotonic()
        left = min(limit, end - begin)
        print(f"== {name}", flush=True)
        status = "out of time"
        if left > 0:
            try:
                code = subprocess.run(command, cwd=ROOT, env=environment, timeout=left).returncode
                status = "ok" if code == 0 else f"exit status {code}"
            except subprocess.TimeoutExpired:
                status = f"stopped after {left:.0f} s"
        done.append(dict(step=name, status=status, seconds=round(time.monotonic() - begin, 1), command=command))
        write(out, "steps", done)
    for step in done:
        print(f"{step['seconds']:8.1f} s  {step['step']}: {step['status']}")
    raise typer.Exit(0 if all(step["status"] == "ok" for step in done) else 1)


@app.command()
def step(
    name: Annotated[str, typer.Argument(help="ceilings, tiles, fused, profile or memory_checker.")],
    device: Annotated[str, typer.Option()] = "cuda",
    out: Annotated[Path, typer.Option()] = RESULTS,
) -> None:
    """Run one of the steps that are no command of their own."""
    import torch

    from benchmarks.machine import machine, versions

    where = torch.device(device)
    made: dict[str, Callable[..., Any]] = dict(
        ceilings=ceilings, tiles=tiles, fused=fused, profile=profile, memory_checker=memory_checker
    )
    if name not in made:
        raise typer.BadParameter(f"got {name!r}, takes one of {list(made)}")
    content = dict(machine=machine(where), versions=versions(), **made[name](where))
    write(out, name, content)
    print(json.dumps({key: value for key, value in content.items() if key not in ("machine", "versions")}, indent=1))


def timed(device: Any, call: Callable[[], Any], rounds: int = 10) -> float:
    """Median seconds of a call that has been made once before."""
    from statistics import median

    from benchmarks.timing import Stopwatch

    call()
    watch = Stopwatch(device)
    return median(watch.seconds(call) for _ in range(rounds))


def host_seconds(call: Callable[[], Any], rounds: int = 200) -> float:
    """Mean seconds that the host needs to launch a call, without waiting for the device."""
    import torch

    for _ in range(10):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(rounds):
        call()
    spent = time.perf_counter() - begin
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return spent / rounds


def shapes(device: Any) -> list[tuple[str, int, int, int]]:
    """(preset, rows of all views, columns, width) of the tiles that large batches are cut into."""
    if device.type != "cuda":
        return [("tiny", 32, 1024, 256)]
    from benchmarks.inputs import PRESETS
    from benchmarks.prediction import GPUS, forward_tiling

    chosen = []
    for preset in ("7b", "32b"):
        shape = PRESETS[preset]
        for views in (1, 2):
            tiling = forward_tiling(GPUS["here"](), views, 16_384, shape)
            chosen.append((preset, views * tiling.rows, tiling.columns, shape.width))
    return [*chosen, ("7b", 6240, 1280, 3584), ("32b", 4368, 1280, 5120), ("7b", 8192, 8192, 3584)]


def ceilings(device: Any) -> dict[str, Any]:
    """What the device and torch can do at best, and how far 16-bit products lie from float64 and from the emulator."""
    import torch

    from vppo_kernels import tensor_cores

    accepted = {}
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.ones(16, 16, dtype=dtype, device=device)
        accepted[str(dtype)] = tensor_cores._accepted(x)._asdict() if device.type == "cuda" else None
    size = 1 << (30 if device.type == "cuda" else 22)
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timed(device, lambda: target.copy_(source))
    products = []
    for preset, rows, columns, width in shapes(device):
        hidden, weight = (torch.randn(n, width, device=device).bfloat16() for n in (rows, columns))
        out = torch.empty(rows, columns, device=device)
        for exact in (False, True):
            taken = timed(device, partial(multiply, out, hidden, weight, exact))
            rate = 2e-12 * rows * columns * width / taken
            products.append(dict(preset=preset, rows=rows, columns=columns, width=width, exact=exact, teraflops=rate))
    return dict(
        accepted=accepted, copy_bytes_per_second=2 * size / seconds, products=products, logits=_logit_errors(device)
    )


def multiply(out: Any, hidden: Any, weight: Any, exact: bool = False) -> None:
    """Logits as the sweeps make them."""
    import torch

    from vppo_kernels import tensor_cores

    if tensor_cores.multiply(hidden, weight):
        tensor_cores.product_(out, hidden, weight.T, exact)
    else:
        torch.mm(hidden.float(), weight.float().T, out=out)


def _logit_errors(device: Any) -> dict[str, Any]:
    """Of bfloat16 products at width 3,584: against float64, and how many agree with the emulator to the bit."""
    import torch

    from benchmarks.inputs import Shape, make_views, make_weight
    from vppo_kernels import tensor_cores

    width = 3584 if device.type == "cuda" else 256
    weight = make_weight(Shape(2048, width), torch.device("cpu"), torch.bfloat16)
    hidden, _ = make_views(weight, 32)
    truth = hidden.double() @ weight.double().T
    found: dict[str, Any] = dict(width=width)
    a, b = hidden.to(device), weight.to(device).T
    if not tensor_cores.multiply(a, b):
        return found
    for exact in (False, True):
        out = torch.empty(truth.shape, device=device)
        tensor_cores.product_(out, a, b, exact)
        off = out.cpu().double() - truth
        name = "exact" if exact else "default"
        found[name] = dict(
            largest=float(off.abs().max()), bias=float((off * truth.sign()).mean()), spread=float(off.std())
        )
        if not exact:
            sys.path.insert(0, str(ROOT / "tests"))
            from support.tensor_core import product

            found["equal_to_the_emulator"] = float((product(hidden, weight.T) == out.cpu()).double().mean())
    return found


def tiles(device: Any) -> dict[str, Any]:
    """Product, folds and gradient of the chosen tiles and of those before: on the device, and on the host."""
    import torch

    from vppo_kernels import backends
    from vppo_kernels.logits import LogitTransform
    from vppo_kernels.statistics import nothing

    found = []
    for preset, rows, columns, width in shapes(device):
        hidden, weight = (torch.randn(n, width, device=device).bfloat16() for n in (rows, columns))
        tile = torch.empty(2, rows // 2, columns, device=device)
        calls: dict[str, Callable[[], Any]] = {"product": partial(multiply, tile.view(-1, columns), hidden, weight)}
        calls["product"]()
        targets, none = torch.zeros(rows // 2, dtype=torch.int64, device=device), tile[:0]
        grads = torch.ones(2, rows // 2, device=device)
        for name in backends.available(device):
            if name == "torch" or name.endswith("_fused"):
                continue
            ops = backends.resolve(name, device, torch.float32).tiles
            known = ops.fold_pair(tile, targets, 0, nothing(2, rows // 2, tile), none)
            view = known[:4].clone()
            calls[f"{name} fold_pair"] = partial(ops.fold_pair, tile, targets, 0, known, none)
            calls[f"{name} fold"] = partial(ops.fold, tile[0], targets, 0, view.clone(), none)
            narrow = torch.empty_like(tile[1], dtype=torch.bfloat16)
            of_tile = (tile[1], view, targets, 0, grads, LogitTransform(), narrow)
            calls[f"{name} gradient"] = partial(ops.gradient_, *of_tile)
        for name, call in calls.items():
            line = dict(preset=preset, rows=rows, columns=columns, call=name)
            found.append(line | dict(seconds=timed(device, call), host_seconds=host_seconds(call, 50)))
    return dict(tiles=found)


def fused(device: Any) -> dict[str, Any]:
    """Forward sweeps of two views, through tiles and fused, beside what the model says; `off` from the first of them,
    as a multiple of the bound. The native one goes in clusters of every size."""
    import torch

    from benchmarks import prediction
    from benchmarks.inputs import PRESETS, make_views, make_weight
    from vppo_kernels import backends, linear_divergence
    from vppo_kernels.backends import native_fused
    from vppo_kernels.reference import divergence_bound

    gpu = device.type == "cuda"
    model: list[tuple[str, Any]] = [
        ("triton", prediction.forward), ("triton_fused", prediction.fused), ("native", prediction.forward),
        *(("native_fused", partial(prediction.native_fused, cluster=size)) for size in (4, 2, 1)),
    ]  # fmt: skip
    found = []
    for preset in ("7b", "32b") if gpu else ("tiny",):
        weight = make_weight(PRESETS[preset], device, torch.bfloat16)
        for rows in (1024, 4096, 16_384) if gpu else (16,):
            hidden, perturbed = make_views(weight, rows)
            first = None
            for name, predict in [each for each in model if each[0] in backends.available(device)]:
                cluster = predict.keywords["cluster"] if name == "native_fused" else None
                native_fused.CLUSTER = cluster or native_fused.CLUSTER
                call = partial(linear_divergence, hidden, perturbed, weight, backend=name)
                kl = call().divergence.double()
                first = kl if first is None else first
                predicted = predict(prediction.GPUS["here"](), 2, rows, PRESETS[preset]).total if gpu else None
                line: dict[str, Any] = dict(
                    preset=preset, rows=rows, backend=name, cluster=cluster, predicted=predicted
                )
                off = float(((kl - first).abs() / divergence_bound(first, cut=True)).max())
                found.append(line | dict(seconds=timed(device, call), off=off))
    return dict(sweeps=found)


def profile(device: Any) -> dict[str, Any]:
    """One forward and backward of few tiles under torch's profiler: every kernel, how often and how long."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from benchmarks.inputs import PRESETS, make_views, make_weight
    from vppo_kernels import linear_divergence

    preset = "7b" if device.type == "cuda" else "tiny"
    shape = PRESETS[preset]._replace(vocab=16_384 if device.type == "cuda" else 1024)
    weight = make_weight(shape, device, torch.bfloat16).requires_grad_()
    hidden, perturbed = (h.requires_grad_() for h in make_views(weight.detach(), 2048 if device.type == "cuda" else 16))

    def call() -> None:
        linear_divergence(hidden, perturbed, weight).divergence.sum().backward()

    call()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profiler(activities=activities) as taken:
        call()
    lines = [
        dict(
            name=event.key, calls=event.count, host_us=event.self_cpu_time_total, device_us=event.self_device_time_total
        )
        for event in taken.key_averages()
    ]
    return dict(preset=preset, kernels=sorted(lines, key=lambda line: -(line["device_us"] or line["host_us"]))[:40])


CHECKED = """
import torch
from vppo_kernels import linear_divergence, linear_logprob, topk_mask, vppo_loss
from vppo_kernels.backends import available
g = torch.Generator("cuda").manual_seed(0)
h, q, w = (torch.randn(n, 40, device="cuda", generator=g).bfloat16().requires_grad_() for n in (13, 13, 1029))
y = torch.arange(13, device="cuda")
out = linear_divergence(h, q, w, targets=y, backend="triton", kind="jsd")
(out.divergence.sum() + out.entropy.sum() + out.logprobs.sum()).backward()
linear_divergence(h, q, w, backend="triton").divergence.sum().backward()
linear_logprob(h, w, y, backend="triton").logprobs.sum().backward()
with torch.no_grad():
    for name in [name for name in available("cuda") if name.endswith("_fused")]:
        linear_divergence(h, q, w, targets=y, backend=name)
        linear_logprob(h, w, y, backend=name)
p = torch.rand(3, 37, device="cuda", requires_grad=True)
vppo_loss(p, p.detach(), torch.ones(3, device="cuda"), torch.ones(3, 37, device="cuda"), p.detach())[0].backward()
torch.cuda.synchronize()
"""


def memory_checker(device: Any) -> dict[str, Any]:
    """Triton's kernels and the fused sweeps on tiny odd shapes under NVIDIA's checker of memory, if it is there."""
    from shutil import which

    tool = which("compute-sanitizer")
    if tool is None or device.type != "cuda":
        return dict(memory_checker="not there")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "7", PYTHON, "-c", CHECKED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stdout[-4000:] + done.stderr[-4000:])
    return dict(memory_checker=done.stdout.strip().splitlines()[-1:])


if __name__ == "__main__":
    app()
