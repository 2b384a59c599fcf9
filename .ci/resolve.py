"""Whether everything that people install together can be: resolved against the package index alone, nothing installed.

Local wheels, extra indexes and pip's configuration are switched off: on a development machine they hide what fails
elsewhere. Run by `make resolve`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINNED = ("--constraint", str(ROOT / "constraints.txt"))
LINUX, ARM, MAC = "x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin"


@dataclass(frozen=True)
class Case:
    """Requirements that must be installable together.

    Attributes:
        name: What they are, for a person.
        requirements: As pip takes them; `vppo-kernels` is this checkout.
        options: Further options of the resolver.
        pythons, platforms: Every pair of them is resolved.
        expect: For some packages the beginning of the version that must be found.
    """

    name: str
    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()
    pythons: tuple[str, ...] = ("3.11",)
    platforms: tuple[str, ...] = (LINUX,)
    expect: Mapping[str, str] = field(default_factory=dict)


EVERY_PYTHON, EVERY_PLATFORM = ("3.11", "3.12", "3.13"), (LINUX, ARM, MAC)
CASES = [
    # what `make demo`, `make test` and `make lint` install: each set holds the one before
    Case("pinned", ("vppo-kernels[dev]",), PINNED, EVERY_PYTHON, EVERY_PLATFORM),
    Case("the kernels", ("vppo-kernels",), (), EVERY_PYTHON, EVERY_PLATFORM),
    Case("the newest of everything", ("vppo-kernels[dev]",), (), EVERY_PYTHON[-1:], EVERY_PLATFORM),
    Case("the oldest of everything", ("vppo-kernels[test]",), ("--resolution", "lowest-direct")),
    Case("trainer and the oldest peft", ("vppo-kernels[trainer]", "peft==0.18.0")),
    Case("trainer and vLLM", ("vppo-kernels[vllm]",)),
    Case("trainer and the newest vLLM that TRL supports", ("vppo-kernels[vllm]", "vllm==0.31.0")),
    Case("trainer and the oldest vLLM that TRL supports", ("vppo-kernels[vllm]", "vllm==0.22.0")),
    Case("the plug-in for verl", ("vppo-kernels[verl]",)),
    Case("kernels beside verl", ("vppo-kernels", "verl[fsdp]==0.9.1"), expect={"trl": "0.27."}),
    Case("kernels beside transformers 4.57", ("vppo-kernels", "transformers==4.57.*")),
    Case("kernels beside the OpenRLHF that pins it", ("vppo-kernels", "openrlhf<0.10.2", "transformers==4.57.*")),
    Case("kernels beside OpenRLHF", ("vppo-kernels", "openrlhf")),
    Case("every extra", ("vppo-kernels[all,vllm,liger,flash-attn,dev]",)),
]


def clean_environment() -> dict[str, str]:
    """This process's, without what would lead a resolver elsewhere; certificates may be needed to reach the index."""
    switches = ("PIP_", "UV_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(switches) or k == "PIP_CERT"}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "MACOSX_DEPLOYMENT_TARGET": "14.0"}


def resolve(case: Case, python: str, platform: str) -> str:
    """What is wrong with one case, or nothing."""
    wanted = [f"{x} @ {ROOT.as_uri()}" if x.startswith("vppo-kernels") else x for x in case.requirements]
    command = [sys.executable, "-m", "uv", "pip", "compile", "--no-config", "--no-header", "--no-annotate", "--quiet"]
    command += ["--python-version", python, "--python-platform", platform, *case.options, "-"]
    done = subprocess.run(command, input="\n".join(wanted), env=clean_environment(), capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip()
    found = dict(line.split("==", 1) for line in done.stdout.split() if "==" in line)
    return "; ".join(
        f"{name}: found {found.get(name)}, expected {version}*"
        for name, version in case.expect.items()
        if not found.get(name, "").startswith(version)
    )


def readme_command() -> str:
    """What is wrong with the very command of `make test`, or nothing: pip's resolver is not uv's."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", *PINNED]
    done = subprocess.run([*command, f"{ROOT}[test]"], env=clean_environment(), capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""


def main() -> int:
    jobs: dict[str, Callable[[], str]] = {"pip: pinned, this Python and platform": readme_command}
    for case in CASES:
        for python in case.pythons:
            for platform in case.platforms:
                jobs[f"{case.name}: Python {python}, {platform}"] = partial(resolve, case, python, platform)
    failed = 0
    with ThreadPoolExecutor(4) as pool:  # they wait for the network
        for name, wrong in zip(jobs, pool.map(lambda job: job(), jobs.values()), strict=True):
            failed += bool(wrong)
            print(f"{'FAILED' if wrong else 'ok    '} {name}", *filter(None, [wrong]), sep="\n", flush=True)
    print(f"{len(jobs) - failed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
