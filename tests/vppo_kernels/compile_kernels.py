"""Compiles every kernel as it is shipped to machine code, for chips that are not here; prints a line of JSON for each.

Run as a process of its own: kernels that the interpreter has taken over do not compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine_code
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vppo_kernels.backends import triton as tiles
from vppo_kernels.backends import triton_fused as fused
from vppo_kernels.backends import triton_loss as loss
from vppo_kernels.backends import triton_tokens as tokens

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {"targets_ptr": "*i64", "bias_ptr": "*bf16", "offsets_ptr": "*i64"} | dict.fromkeys(
    ("mask_ptr", "keep_ptr", "present_ptr"), "*i1"
)
LOSS = ("low", "high", "dual", "limit", "nll_coef", "entropy_coef", "kl_coef")
MIXTURE = ("scale_p", "to_cap_p", "scale_q", "to_cap_q", "beta", "log_beta", "log_rest")
FLOATS = ("threshold", "scale", "to_cap", *MIXTURE, "scale_min", "to_one", "scale_range", "min_spread", *LOSS)
UNALIGNED = ("first", "splits", "ratio_bits", "total", "blocks", "stride")
ONES = ("rows", "columns", "total", "blocks", "stride")
OUTS = ("*fp32", "*bf16")  # where a gradient goes: over its tile, or beside those of other tiles
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def variants(target: str) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, str], dict[str, Any]]]:
    """(name, kernel, constants, types of arguments that are not fp32 pointers or integers, options)."""
    shape, options = dict(ROWS=1, BLOCK=tiles.BLOCK), tiles.OPTIONS
    for with_targets in (True, False):
        constants = dict(HAS_TARGETS=with_targets, **shape) | ({} if with_targets else {"targets_ptr": None})
        yield f"fold targets={with_targets}", tiles._fold_kernel, constants, {}, options
        yield f"fold_pair targets={with_targets}", tiles._fold_pair_kernel, constants, {}, options
        for jsd in (True, False):
            # of Jensen-Shannon's the general one, which takes more registers
            flags = dict(JSD=jsd, HALF=False, SOFTCAP_P=jsd, SOFTCAP_Q=jsd)
            more = constants | flags | ({} if jsd else {"terms_ptr": None})
            for out in OUTS:
                name = f"gradient_pair targets={with_targets} jsd={jsd} {out}"
                yield name, tiles._gradient_pair_kernel, more, {"out_ptr": out}, options
    for half in (True, False):
        yield f"fold_jsd half={half}", tiles._fold_jsd_kernel, dict(HALF=half, **shape), {}, options
    for softcap in (True, False):
        for out in OUTS:
            constants = dict(SOFTCAP=softcap, **shape)
            yield f"gradient softcap={softcap} {out}", tiles._gradient_kernel, constants, {"out_ptr": out}, options

    for name, kernel, constants, types in token_variants():
        yield name, kernel, constants, types, dict(num_warps=tokens.WARPS)
        alone = dict.fromkeys((size for size in ONES if size in kernel.arg_names), 1)  # 1 is a constant to the compiler
        yield f"{name}, one token", kernel, constants | alone, types, dict(num_warps=tokens.WARPS)

    arch = TARGETS[target].arch
    capability = divmod(arch, 10) if isinstance(arch, int) else (0, 0)
    for pair in (True, False):
        constants = dict(PAIR=pair, BLOCK=128)
        yield f"merge_parts pair={pair}", fused._merge_parts_kernel, constants, {}, tiles.OPTIONS
        for dtype, full in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)):
            exact = dtype == torch.float32 and pair
            absent = ({} if full else {"bias_ptr": None}) | ({} if exact else {"shares_rounding_ptr": None})
            for described in (False, True) if capability >= (9, 0) and dtype != torch.float32 else (False,):
                eight_apart = target in ("sm_80", "sm_90") and dtype != torch.float32
                config = fused.configuration(dtype, described, eight_apart)
                options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
                flags = dict(
                    HAS_BIAS=full, HAS_TARGETS=True, SHARES_ROUNDING=exact, SCALED=full, DESCRIPTORS=described,
                    ALTERNATE=pair and eight_apart,
                )  # fmt: skip
                h = w = f"*{NAMES[dtype]}"
                if described:
                    h = f"tensordesc<{NAMES[dtype]}[{config['BLOCK_M']}, {config['BLOCK_K']}]>"
                    w = f"tensordesc<{NAMES[dtype]}[{config['BLOCK_N']}, {config['BLOCK_K']}]>"
                name = f"sweep pair={pair} {NAMES[dtype]} bias={full} descriptors={described}"
                constants = dict(PAIR=pair, GROUP=fused.GROUP, w_inner=1, **flags, **config, **absent)
                yield name, fused._sweep_kernel, constants, {"h": h, "w": w}, options


def token_variants() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, str]]]:
    """Selection, shaping and loss: as `variants`, less the options."""
    for packed, scores in ((False, "*fp32"), (True, "*bf16")):
        constants = dict(PACKED=packed, BOUNDED=packed, KEYS=tokens.KEYS) | ({} if packed else {"offsets_ptr": None})
        types = {"scores_ptr": scores, "ratio_bits": "i64", "keep_ptr": scores if packed else "*i1"}
        yield f"topk packed={packed} {scores}", tokens._topk_kernel, constants, types
    shape = dict(ROWS=1, BLOCK=tokens.BLOCK)
    yield "row_means", tokens._row_means_kernel, shape, {}
    for flag in (True, False):
        yield f"alpha dynamic={flag}", tokens._alpha_kernel, dict(DYNAMIC=flag, BLOCK=tokens.BLOCK), {}
        yield f"shape per_token={flag}", tokens._shape_kernel, dict(PER_TOKEN=flag, **shape), {}
        constants = dict(DUAL=flag, PER_TOKEN=flag, **shape)
        gone = [] if flag else ["entropy_ptr", "ref_ptr", "weights_ptr", "dependency_ptr", "values_ptr"]
        forward = constants | dict(REF_OF_ALL=flag) | dict.fromkeys(gone)
        yield f"loss all={flag}", loss._loss_kernel, forward, {}
        gone = [] if flag else ["ref_ptr", "weights_ptr", "grad_entropy_ptr"]
        yield f"loss_gradient all={flag}", loss._loss_gradient_kernel, constants | dict.fromkeys(gone), {}


def compile_one(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], options: dict[str, Any], target: str
) -> Any:
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = name.endswith("_ptr")
        signature[name] = (
            types.get(name) or POINTERS.get(name) or ("*fp32" if pointer else "fp32" if name in FLOATS else "i32")
        )
        # sizes and addresses are multiples of 16 in real models: that is the code that runs
        if name not in FLOATS and not signature[name].startswith("tensordesc") and name not in UNALIGNED:
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGETS[target], options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and local memory of a thread: what spills would take."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {name.lower(): int(usage[name]) for name in ("REG", "STACK", "LOCAL")}


def main(target: str) -> None:
    for name, kernel, constants, types, options in variants(target):
        compiled = compile_one(kernel, constants, types, options, target)
        line = {"kernel": name, "target": target, "shared": compiled.metadata.shared}
        if "cubin" in compiled.asm:
            line |= resources(compiled.asm["cubin"])
            if name.startswith("fold"):
                line["loops"] = [(loop.size, loop.counts["BAR"]) for loop in machine_code.loops(compiled.asm["cubin"])]
            if name.startswith("sweep"):
                around, *inner = machine_code.shortest_ways(compiled.asm["cubin"])
                entries = constants["BLOCK_M"] * constants["BLOCK_N"] // (32 * options["num_warps"])
                line["beside_product"] = (around.size - sum(loop.size for loop in inner[:1])) / entries
                line["shared_accesses"] = around.counts["LDS"] + around.counts["STS"]
            line["wgmma"] = "wgmma" in compiled.asm["ptx"]
            line["tcgen05"] = "tcgen05.mma" in compiled.asm["ptx"]
        else:
            line["code"] = len(compiled.asm["hsaco"])
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
