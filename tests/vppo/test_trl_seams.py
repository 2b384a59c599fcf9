"""A TRL in which one thing that is needed has moved: it is told when a trainer is built, and named."""

from __future__ import annotations

import importlib.util
import logging
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import reduce
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from accelerate import PartialState
from packaging.requirements import Requirement
from support.runs import fix_rollouts, generation_batch, rows, trainer

from vppo import trl_seams, trl_utils
from vppo.seams import MovedSeamError, lacking
from vppo.trl_seams import HEAD, SEAMS, TRAINER, VLLM_SEAMS, Seam, check_seams
from vppo.trl_utils import TESTED


def owner_of(seam: Seam) -> tuple[Any, str]:
    """The module or class whose own attribute a seam is, and its name there."""
    module, _, path = seam.target.partition(":")
    *above, name = path.split(".")
    owner = reduce(getattr, above, import_module(module))
    if isinstance(owner, type):  # create_model_card is of a base class
        owner = next(kind for kind in owner.__mro__ if name in vars(kind))
    return owner, name


def without(seam: Seam, lost: str) -> Callable[..., Any]:
    """A function that takes and mentions what a seam needs, except one name."""
    taken = [name for name in seam.parameters.split() if name != lost]
    mentioned = [name for name in seam.uses.split() if name != lost]
    made: dict[str, Any] = {}
    exec(f"def moved(self, {', '.join(taken)}):\n    return {mentioned}", made)
    return made["moved"]


def all_moves(seams: tuple[Seam, ...]) -> Iterator[Any]:
    """Each seam that is gone, and each that lacks one of its names."""
    for seam in seams:
        place = seam.target.partition(":")[2]
        inherited = f"{TRAINER}.{place.split('.')[-1]}"
        if place.endswith("__init__") or lacking(inherited, seam.parameters.split(), seam.uses.split()):
            yield pytest.param(seam, "", id=f"{place} is gone")  # else transformers has the same
        for name in (*seam.parameters.split(), *seam.uses.split()):
            yield pytest.param(seam, name, id=f"{place} without {name}")


def move(seam: Seam, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = owner_of(seam)
    if lost:
        monkeypatch.setattr(owner, name, without(seam, lost))
    elif name == "__init__":
        monkeypatch.setattr(owner, name, lambda self: None)
    else:
        monkeypatch.delattr(owner, name)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    trl_seams.warn_slower.cache_clear()
    PartialState()  # its logger needs one, whichever tests have run before
    caplog.set_level(logging.WARNING, logger="vppo.trl_seams")
    return caplog


@pytest.mark.parametrize(("seam", "lost"), all_moves(SEAMS + VLLM_SEAMS))
def test_what_results_depend_on_is_missed(seam: Seam, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_seams(use_vllm=True)
    move(seam, lost, monkeypatch)
    with pytest.raises(MovedSeamError) as raised:
        check_seams(use_vllm=True)
    said = str(raised.value)
    assert said.startswith(f"trl: got version {metadata.version('trl')}, which lacks ") and said.endswith(TESTED)
    assert (repr(lost) if lost and seam.target.split(".")[-1] != "__init__" else "") in said
    assert seam.target in said and seam.carries in said


@pytest.mark.parametrize(
    ("method", "carried"),
    [
        ("_compute_loss", "per-token advantages, and the official penalty"),
        ("_prepare_inputs", "the trajectory factor of the official recipe"),
        ("_get_per_token_logps_and_entropies", "the comparison with the sampler"),
    ],
)
def test_a_trainer_is_not_built(method: str, carried: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(trl.GRPOTrainer, method)
    with pytest.raises(MovedSeamError, match=rf"{method}.*\(for .*{carried}\); takes {TESTED}"):
        trainer(tmp_path)


def test_the_vllm_hand_over_is_needed_with_vllm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = import_module(trl_seams.VLLM)
    monkeypatch.setattr(vllm.VLLMGeneration, "generate", lambda self, conversations: None)
    check_seams(use_vllm=False)
    with pytest.raises(MovedSeamError, match=r"parameter 'prompts', 'images' of .*generate \(for the vLLM hand-over\)"):
        check_seams(use_vllm=True)


def test_a_shuffle_that_stays_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: pytest.LogCaptureFixture
) -> None:
    """TRL calls it by another name: rollouts are shuffled over micro-batches, and one warning says so."""
    grpo = import_module(trl_seams.GRPO)
    inside = trl.GRPOTrainer._prepare_inputs.__wrapped__
    names = ["shuffle_rows" if name == "shuffle_sequence_dict" else name for name in inside.__code__.co_names]
    monkeypatch.setattr(grpo, "shuffle_rows", grpo.shuffle_sequence_dict, raising=False)
    monkeypatch.setattr(inside, "__code__", inside.__code__.replace(co_names=tuple(names)))
    runs = [trainer(tmp_path, per_device_train_batch_size=8) for _ in range(2)]
    assert warned.text.count("steps slower") == 1 and "'shuffle_sequence_dict' in " in warned.text
    fix_rollouts(runs[0])
    runs[0].model.train()
    torch.manual_seed(0)
    batch = runs[0]._prepare_inputs([row for row in rows(2) for _ in range(4)])
    assert sorted(batch["prompt"].tolist()) == [0] * 4 + [4] * 4 != batch["prompt"].tolist()
    monkeypatch.undo()
    monkeypatch.delattr(grpo, "shuffle_sequence_dict")
    assert not trl_seams.keeps_order() and warned.text.count("steps slower") == 2


@pytest.mark.parametrize(("seam", "lost"), all_moves(HEAD))
def test_a_head_that_cannot_be_exchanged_is_told(seam: Seam, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not trl_seams.exchangeable_head()
    move(seam, lost, monkeypatch)
    missing = trl_seams.exchangeable_head()
    assert seam.target in missing and lost in missing


def test_with_trls_own_head_the_loss_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path)
    fix_rollouts(run)
    batch = generation_batch(run, rows(1))
    expected = run._compute_loss(run.model, batch)
    monkeypatch.setattr("vppo.fused_head.exchangeable_head", lambda: "its own function")
    for _ in range(2):
        torch.testing.assert_close(run._compute_loss(run.model, batch), expected, rtol=1e-4, atol=1e-6)
    assert warned.text.count("TRL's own head is used") == 1 and "TRL lacks its own function" in warned.text


def test_arguments_in_another_order_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    function = import_module(trl_seams.UTILS)._ChunkedLogProbFunction
    first, *others = trl_seams.HEAD_ARGUMENTS
    made: dict[str, Any] = {}
    exec(f"def forward(ctx, {', '.join([*others, first])}): ...", made)
    monkeypatch.setattr(function, "forward", staticmethod(made["forward"]))
    assert trl_seams.exchangeable_head() == f"the order of {', '.join(trl_seams.HEAD_ARGUMENTS)} in its fused head"


def test_a_module_that_is_gone_and_one_that_is_not_installed() -> None:
    assert lacking("trl.trainer.no_such_module:Trainer") == ["trl.trainer.no_such_module"]
    assert lacking("trl:NoSuchTrainer.train") == ["trl:NoSuchTrainer.train"]
    with pytest.raises(ModuleNotFoundError):
        lacking("no_such_package.module:name")


@pytest.mark.parametrize("name", trl_utils.__all__)
def test_a_function_that_is_not_exported_is_missed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("trl.data_utils", "trl.trainer.utils"):
        monkeypatch.delattr(import_module(module), name, raising=False)
    spec = importlib.util.find_spec("vppo.trl_utils")  # loaded apart from the one that is in use
    with pytest.raises(MovedSeamError, match=rf"trl: got version {trl.__version__}: .*{name}.*; takes {TESTED}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_range_is_the_packages() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = map(Requirement, project["optional-dependencies"]["trainer"])
    stated = next(each.specifier for each in wanted if each.name == "trl")
    assert stated == Requirement(TESTED).specifier and trl.__version__ in stated


def test_no_private_name_of_trl_is_anywhere_else() -> None:
    methods = [name for name in dir(trl.GRPOTrainer) if name.startswith("_") and not name.startswith("__")]
    state = [name for name in SEAMS[0].uses.split() if name.startswith("_")]
    assert "_compute_loss" in methods and "_metrics" in state
    package = Path(trl_seams.__file__).parent
    # what distillation overrides is of another trainer, and is checked where it is written
    trainers = sorted({*package.glob("*trainer.py"), package / "monitoring" / "logged_trainer.py"}
                      - {package / "distill_trainer.py"})  # fmt: skip
    assert len(trainers) == 10
    for path in trainers:
        words = set(re.findall(r"\b(?:def |self\.|super\(\)\.)(_\w+)", path.read_text(encoding="utf-8")))
        assert not words & {*methods, *state}, path
    for path in package.rglob("*.py"):
        assert "unittest" not in path.read_text(encoding="utf-8"), path
