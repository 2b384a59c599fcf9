"""Rewards by name: the built-in ones, functions of modules and files, and several with weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vppo.errors import InputError
from vppo.rewards import accuracy_reward
from vppo.rewards.format import format_reward
from vppo.rewards.named import load_reward, load_rewards
from vppo.train_config import load_config

MODULE = """
import functools
from dataclasses import dataclass

@dataclass
class Bound:
    most: int = 3

def length(completions, **_):
    return [float(len(c) < Bound().most) for c in completions]

def scaled(completions, by, **_):
    return [by for _ in completions]

twice = functools.partial(scaled, by=2.0)
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module of rewards, which is not the working folder; the working folder is `elsewhere` in it."""
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_rewards.py").write_text(MODULE)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield tmp_path


def config(folder: Path, line: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(f"model: some/model\ndataset: some/dataset\noutput_dir: run\n{line}\n")
    return path


def test_built_in_rewards() -> None:
    assert load_reward("accuracy") is accuracy_reward
    assert load_reward("format") is format_reward


def test_a_file(folder: Path) -> None:
    reward = load_reward(f"{folder}/own_rewards.py:length")
    assert reward(["ab", "abcd"]) == [1.0, 0.0] and reward.__name__ == "length"
    assert load_reward("../own_rewards.py:length")(["ab"]) == [1.0]


def test_a_module_of_the_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("own_package_of_this_test").mkdir()
    Path("own_package_of_this_test", "rewards.py").write_text("from . import one\ndef f(**_):\n    return one\n")
    Path("own_package_of_this_test", "__init__.py").write_text("one = 1.0\n")
    assert load_reward("own_package_of_this_test.rewards:f")() == 1.0


def test_an_object_without_a_name_is_called_as_the_config_does(folder: Path) -> None:
    reward = load_reward(f"{folder}/own_rewards.py:twice")
    assert reward.__name__ == "twice" and reward(["a"]) == [2.0]


def test_files_of_one_name_in_two_folders(folder: Path) -> None:
    (folder / "elsewhere" / "own_rewards.py").write_text("def length(**_):\n    return 'elsewhere'\n")
    first, second = (load_reward(f"{path}/own_rewards.py:length") for path in (folder, folder / "elsewhere"))
    assert first(completions=["a"]) == [1.0] and second(completions=["a"]) == "elsewhere"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("acuracy", "reward: got 'acuracy', takes 'accuracy', 'format', 'module:function' or 'file.py:function'; did"),
        ("acuracy", "did you mean 'accuracy'?"),
        ("nothing", "reward: got 'nothing', takes 'accuracy', 'format', 'module:function' or 'file.py:function'"),
        (":length", "reward: got ':length', takes"),
        ("own_rewards.py:", "reward: got 'own_rewards.py:', takes"),
        ("no_such_module_here:f", "reward: cannot import 'no_such_module_here' for 'no_such_module_here:f'"),
        ("no_such.py:f", "reward: no file no_such.py for 'no_such.py:f', beside the config or from"),
        ("{folder}/own_rewards.py:number", "own_rewards.py has no function 'number': it is of type int, not callable"),
        ("{folder}/own_rewards.py:lenght", "own_rewards.py has no function 'lenght'; did you mean 'length'?"),
        ("{folder}/broken.py:f", "reward: cannot import 'missing_here' for"),
    ],
)
def test_a_reward_that_is_not_there_is_named(folder: Path, name: str, expected: str) -> None:
    (folder / "broken.py").write_text("import missing_here\n")
    with pytest.raises(InputError) as caught:
        load_reward(name.format(folder=folder))
    assert expected in str(caught.value)


def test_several(folder: Path) -> None:
    names = ["accuracy", "format", f"{folder}/own_rewards.py:length"]
    loaded = [reward.__name__ for reward in load_rewards(names, [1.0, 0.5, -0.1])]
    assert loaded == ["accuracy_reward", "format_reward", "length"]
    assert load_rewards("accuracy") == load_rewards(["accuracy"], [2.0]) == [accuracy_reward]


@pytest.mark.parametrize(
    ("names", "weights", "expected"),
    [
        ([], None, "reward: got an empty list, takes one or several of 'accuracy'"),
        (["accuracy", "format"], [1.0], "reward_weights: got 1 weights for 2 rewards (accuracy, format)"),
        ("accuracy", [1.0, 2.0], "reward_weights: got 2 weights for 1 rewards (accuracy)"),
        ("accuracy", [float("nan")], "reward_weights: got [nan], takes finite numbers"),
        (["accuracy", "format"], [1.0, float("-inf")], "reward_weights: got [1.0, -inf], takes finite numbers"),
        ("accuracy", [], "reward_weights: got 0 weights for 1 rewards (accuracy)"),
        (["format", "format"], None, "reward: 'format' and 'format' are both called 'format_reward'"),
    ],
)
def test_rewards_that_do_not_fit_together(names: list[str], weights: list[float] | None, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        load_rewards(names, weights)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("name", ["own_rewards:length", "own_rewards.py:length"])
def test_a_file_beside_the_config_has_its_whole_path(folder: Path, name: str) -> None:
    whole = f"{folder}/own_rewards.py:length"
    loaded = load_config(config(folder, f"reward: [accuracy, {name}]"))
    assert loaded["reward"] == ["accuracy", whole]
    assert load_config(config(folder, f"reward: {name}"))["reward"] == whole
    assert load_config(config(folder, ""), ["--reward", name])["reward"] == whole
    assert load_reward(whole)(["ab"]) == [1.0]


def test_which_of_two_files(folder: Path) -> None:
    """A config means the one beside it, the command line the one in the working folder."""
    (folder / "elsewhere" / "own_rewards.py").write_text(MODULE)
    assert load_config(config(folder, "reward: own_rewards:length"))["reward"] == f"{folder}/own_rewards.py:length"
    given = load_config(config(folder, ""), ["--reward=own_rewards:length"])
    assert given["reward"] == f"{folder}/elsewhere/own_rewards.py:length"


def test_what_is_no_file_stays_as_it_is(folder: Path) -> None:
    for name in ("accuracy", "some.module:f", "no_file.py:f", "format"):
        assert load_config(config(folder, f"reward: '{name}'"))["reward"] == name


def test_a_value_of_the_wrong_type(folder: Path) -> None:
    with pytest.raises(InputError, match=r"reward: got \[1\] \(list\), takes text or a list \(text\)"):
        load_config(config(folder, "reward: [1]"))
