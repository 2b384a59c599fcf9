"""Builds the native libraries of `csrc/` into the package; everything else is in pyproject.toml.

They are plain shared libraries that know neither Python's nor torch's binary interface, so one wheel serves every
version of both. What cannot be built is left out and the reason noted in `lib/build.json`, for `vppo_kernels` to tell.

CXX and CXXFLAGS name the C++17 compiler and more flags; VPPO_BUILD_CUDA is "auto" (build it if nvcc is there), 0 or 1.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).parent
LIB = Path("vppo_kernels", "lib")
BINDINGS = ROOT / "csrc" / "bindings.cpp"  # of every library
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]  # nobody reads errno or the flags of the FPU
X86 = platform.machine().lower() in ("x86_64", "amd64")
# csrc/cpu/simd/ is compiled once per instruction set; on Arm the baseline has NEON
INSTRUCTIONS = {"baseline": []} | (
    {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"],
    }
    if X86
    else {}
)
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# of the GPUs that CUDA code is compiled for, as far as the compiler knows them: what it calls them, and what it makes
ARCHITECTURES = {"compute_80": "80", "compute_90": "90a", "compute_100": "100"}


class NotBuiltError(Exception):
    """Why a library is left out."""


def run(command: list[str]) -> None:
    """Run a compiler.

    Raises:
        NotBuiltError: It failed.
    """
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr, flush=True)
        what = next((line for line in (done.stderr + done.stdout).splitlines() if "error" in line), "")
        raise NotBuiltError(f"{shlex.join(command[:1])} failed: {what.strip() or f'exit status {done.returncode}'}")


def compile_all(commands: list[list[str]]) -> None:
    """Run compilers side by side."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        list(pool.map(run, commands))


def compiler() -> list[str]:
    """The C++ compiler: $CXX, or what is on the path."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise NotBuiltError(f"there is no C++ compiler ({named[0] if named else 'c++, g++ or clang++'})")


def ffi() -> Path:
    """The folder of apache-tvm-ffi: what connects the libraries with Python, and hands them tensors of torch."""
    spec = find_spec("tvm_ffi")
    if spec is None or spec.origin is None:
        raise NotBuiltError("apache-tvm-ffi is not installed")
    return Path(spec.origin).parent


def build_cpu(objects: Path, out: Path) -> str:
    cxx, headers = compiler(), ffi()
    flags = [*FLAGS, "-isystem", str(headers / "include"), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    units = [(source, source.stem, []) for source in [BINDINGS, *sorted(ROOT.glob("csrc/cpu/*.cpp"))]]
    for source in sorted(ROOT.glob("csrc/cpu/simd/*.cpp")):
        for name, more in INSTRUCTIONS.items():
            units.append((source, f"{source.stem}_{name}", [*more, f"-DVPPO_INSTRUCTIONS={name}"]))
    made = [str(objects / f"{name}.o") for _, name, _ in units]
    compile_all([[*cxx, *flags, *more, "-c", str(s), "-o", o] for (s, _, more), o in zip(units, made, strict=True)])
    # libtvm_ffi is in the process before this library is: no path to it is needed
    run([*cxx, *flags, "-shared", *made, f"-L{headers / 'lib'}", "-ltvm_ffi", "-ldl", "-o", str(out)])
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout.splitlines()
    return version[0] if version else cxx[0]


def cuda_flags(nvcc: str) -> list[str]:
    """Machine code for every architecture that this compiler knows, and PTX for later ones."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    known = [name for name in ARCHITECTURES if name in listed]
    if not known:
        raise NotBuiltError(f"{nvcc} knows none of {', '.join(ARCHITECTURES)}")
    codes = [f"-gencode=arch=compute_{ARCHITECTURES[name]},code=sm_{ARCHITECTURES[name]}" for name in known]
    return [*CUDA_FLAGS, *codes, f"-gencode=arch={known[-1]},code={known[-1]}"]


def build_cuda(objects: Path, out: Path) -> str:
    wanted = os.environ.get("VPPO_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"VPPO_BUILD_CUDA: got {wanted!r}, takes auto, 0 or 1")
    if wanted == "0":
        raise NotBuiltError("VPPO_BUILD_CUDA is 0")
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if nvcc is None:
        raise NotBuiltError("there is no nvcc")
    headers, flags = ffi(), cuda_flags(nvcc)
    # kernels know nothing of Python: nvcc does not see the headers that would take it longer than the kernels do
    host = [*CUDA_FLAGS, "-isystem", str(headers / "include")]
    units = [(source, flags) for source in sorted(ROOT.glob("csrc/cuda/*.cu"))]
    units += [(source, host) for source in [BINDINGS, *sorted(ROOT.glob("csrc/cuda/*.cpp"))]]
    made = [str(objects / f"{source.stem}.o") for source, _ in units]
    compile_all([[nvcc, *more, "-c", str(s), "-o", o] for (s, more), o in zip(units, made, strict=True)])
    # the runtime linked statically asks for the driver when it is first called, not when the library is loaded
    run([nvcc, "-shared", "--cudart=static", *made, f"-L{headers / 'lib'}", "-ltvm_ffi", "-o", str(out)])
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line for line in version if "release" in line), nvcc)


LIBRARIES = {"cpu": build_cpu, "cuda": build_cuda}


class BuildNative(Command):
    """Compile `csrc/` into `vppo_kernels/lib`, of the build or with an editable install of this tree."""

    description = "compile the native libraries"
    user_options = [  # noqa: RUF012
        ("build-lib=", None, "folder that the package is built in"),
        ("build-temp=", None, "folder of object files"),
        ("inplace", "i", "build into the source tree"),
    ]
    boolean_options = ["inplace"]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.build_lib = self.build_temp = ""
        self.inplace = self.editable_mode = False

    def finalize_options(self) -> None:
        given = self.distribution.get_command_obj("build")
        given.ensure_finalized()
        self.build_lib = self.build_lib or given.build_lib
        self.build_temp = self.build_temp or given.build_temp

    def run(self) -> None:
        folder = ROOT / LIB if self.inplace or self.editable_mode else ROOT / self.build_lib / LIB
        folder.mkdir(parents=True, exist_ok=True)
        record = {}
        for name, make in LIBRARIES.items():
            library, objects = folder / f"libvppo_{name}.so", ROOT / self.build_temp / name
            objects.mkdir(parents=True, exist_ok=True)
            fresh = objects / library.name
            try:
                record[name] = {"built": True, "by": make(objects, fresh)}
                # a process that has the old library loaded keeps it: the new one takes over its name only
                os.replace(shutil.copy(fresh, library.with_suffix(".new")), library)
            except NotBuiltError as reason:
                if name == "cuda" and os.environ.get("VPPO_BUILD_CUDA") == "1":
                    raise SystemExit(f"VPPO_BUILD_CUDA is 1, but {reason}") from None
                library.unlink(missing_ok=True)
                record[name] = {"built": False, "why": str(reason)}
                print(f"native library for {name} left out: {reason}", file=sys.stderr, flush=True)
        (folder / "build.json").write_text(json.dumps(record, indent=2) + "\n")

    def get_source_files(self) -> list[str]:
        return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file())

    def get_outputs(self) -> list[str]:
        names = [*(f"libvppo_{name}.so" for name in LIBRARIES), "build.json"]
        return [str(Path(self.build_lib, LIB, name)) for name in names if Path(self.build_lib, LIB, name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012


class Platform(Distribution):
    """A distribution with compiled code, though setuptools compiles none of it: its wheels are of a platform."""

    def has_ext_modules(self) -> bool:
        return True


class Wheel(bdist_wheel):
    """One wheel per platform, for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(distclass=Platform, cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel})
