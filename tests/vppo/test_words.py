"""Words of the command line as the values that people mean by them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vppo.errors import InputError
from vppo.train_config import load_config


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., Path]:
    def write(more: str = "") -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(f"model: some/model\ndataset: some/dataset\noutput_dir: {tmp_path / 'run'}\n{more}")
        return path

    return write


def load_error(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "o #2",
        "a\nb",
        "&a b",
        "*look*",
        "Note: be brief",
        "yes",
        "2024",
        "null",
        "[a]",
        "{a}",
        "'quoted'",
        " x ",
        "~",
        "",
    ],
)
@pytest.mark.parametrize("key", ["output_dir", "instruction", "dataset_split"])
def test_a_word_for_a_text_is_that_text(config_file: Callable[..., Path], key: str, text: str) -> None:
    assert load_config(config_file(), [f"--{key}={text}"])[key] == text
    assert load_config(config_file(), [f"--{key}", text])[key] == text


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--max_steps=010", 10),
        ("--max_steps=1_000", 1000),
        ("--learning_rate=1e-6", 1e-6),
        ("--learning_rate=.5", 0.5),
        ("--max_grad_norm=2", 2),
        ("--use_vllm=true", True),
        ("--use_vllm", True),
        ("--bf16=null", None),
        ("--run_name=null", None),
        ("--run_name=2024", "2024"),
        ("--image_key=no", "no"),
        ("--resume=true", True),
        ("--resume=false", False),
        ("--resume=runs/a #2/checkpoint-3", "runs/a #2/checkpoint-3"),
        ("--optim=adamw_torch", "adamw_torch"),
        ("--report_to=[a, b]", ["a", "b"]),
        ("--report_to=none", "none"),
        ("--lora_target_modules=.*(q_proj|head)", ".*(q_proj|head)"),
        ("--lora_target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("--pad_to_multiple_of=8", 8),
        ("--generation_kwargs={top_k: 3}", {"top_k": 3}),
        ("--deepspeed=configs/zero #2.json", "configs/zero #2.json"),
        ("--dtype=bfloat16", "bfloat16"),
        ("--bad_rows=skip", "skip"),
    ],
)
def test_a_word_for_something_else_is_parsed(config_file: Callable[..., Path], word: str, expected: Any) -> None:
    got = load_config(config_file(), [word])[word[2:].partition("=")[0]]
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--max_steps=1:30", "max_steps: got '1:30' (str), takes a whole number"),
        ("--max_steps=3 #4", "max_steps: got '3 #4' (str), takes a whole number"),
        ("--max_steps=0x10", "max_steps: got '0x10' (str), takes a whole number"),
        ("--learning_rate=1:30.5", "learning_rate: got '1:30.5' (str), takes a number"),
        ("--use_vllm=true #", "use_vllm: got 'true #' (str), takes true or false"),
        ("--bad_rows=ignore", "bad_rows: got 'ignore' (str), takes one of ['error', 'skip']"),
        ("--output_dir", "output_dir: got True (bool), takes text"),
    ],
)
def test_a_word_of_the_wrong_type_is_named(config_file: Callable[..., Path], word: str, expected: str) -> None:
    assert load_error(config_file(), word) == f"command line: {expected}"


def test_numbers_in_a_file_are_decimal(config_file: Callable[..., Path]) -> None:
    config = load_config(config_file("max_steps: 010\nlearning_rate: 1_0.5e-1\n"))
    assert (config["max_steps"], config["learning_rate"]) == (10, 1.05)
    assert "max_steps: got '1:30' (str)" in load_error(config_file("max_steps: 1:30\n"))


def test_a_date_that_does_not_exist_is_named(config_file: Callable[..., Path]) -> None:
    expected = "command line: --max_steps takes a YAML value, got '2024-13-45'"
    assert load_error(config_file(), "--max_steps=2024-13-45").startswith(expected)
    path = config_file("max_steps: 2024-13-45\n")
    assert load_error(path).startswith(f"{path}: not valid YAML: ")


def test_what_is_nested_too_deeply_is_named(config_file: Callable[..., Path]) -> None:
    deep = "[" * 5000
    expected = "command line: --report_to takes a YAML value, got "
    assert load_error(config_file(), f"--report_to={deep}").startswith(expected)
    path = config_file(f"report_to: {deep}\n")
    assert load_error(path) == f"{path}: not valid YAML: it is nested too deeply"
