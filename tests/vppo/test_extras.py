"""A package that an extra brings, and that is not there, is named together with the extra."""

import subprocess
import sys
from importlib.metadata import requires

import pytest

from vppo.extras import MissingExtraError, extra_of, named_extras


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("trl", "trainer"),
        ("transformers", "trainer"),
        ("math_verify", "trainer"),
        ("PIL", "trainer"),
        ("transfer_queue", "verl"),
        ("zmq", "verl"),
        ("yaml", "trainer"),
        ("matplotlib", "analysis"),
        ("sklearn", "demo"),
        ("liger_kernel", None),  # TRL's own, behind its extra
        ("torch", None),
        ("vppo", None),
    ],
)
def test_extra_of(package: str, extra: str | None) -> None:
    assert extra_of(package) == extra


def test_no_requirement_is_declared_twice() -> None:
    ours = [r.partition(";")[0].strip() for r in requires("vppo-kernels") or [] if not r.startswith("vppo-kernels")]
    names = [r.split("[")[0].split(">")[0].split("=")[0].split("<")[0] for r in ours if "[" not in r]
    assert len(names) == len(set(names))


def test_missing_package_names_its_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"needs 'sklearn'.*vppo-kernels\[demo\]"), named_extras():
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets")


@pytest.mark.parametrize("name", ["einops", "vppo.trainer", None])
def test_other_failing_imports_pass_as_they_are(name: str | None) -> None:
    with pytest.raises(ModuleNotFoundError) as caught, named_extras():
        raise ModuleNotFoundError("of somebody else", name=name)
    assert not isinstance(caught.value, MissingExtraError)


BLOCKED = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
sys.argv = ["vppo", *{arguments!r}]
{code}
"""


def run(code: str, blocked: list[str], *arguments: str) -> subprocess.CompletedProcess:
    script = BLOCKED.format(blocked=blocked, arguments=list(arguments), code=code)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_command_without_the_trainer() -> None:
    done = run("from vppo.__main__ import main; main()", ["typer"], "--help")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "pip install 'vppo-kernels[trainer]'" in done.stderr


def test_demo_without_its_extra(tmp_path) -> None:  # type: ignore[no-untyped-def]
    arguments = ("demo", "--out", str(tmp_path / "out"), "--steps", "1")
    done = run("from vppo.__main__ import main; main()", ["sklearn"], *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "pip install 'vppo-kernels[demo]'" in done.stderr.replace("\n", " ")


def test_trainer_class_without_its_extra() -> None:
    done = run("import vppo; vppo.VPPOTrainer", ["trl"])
    assert "pip install 'vppo-kernels[trainer]'" in done.stderr


def test_kernels_need_none_of_them() -> None:
    blocked = ["trl", "transformers", "datasets", "accelerate", "numpy", "PIL", "typer", "rich", "yaml", "triton"]
    done = run("import vppo_kernels, vppo; print(vppo.vppo_loss.__module__)", blocked)
    assert done.stdout.strip() == "vppo_kernels.loss", done.stderr
