import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vppo.errors import InputError
from vppo.train import train
from vppo.train_config import load_config, make_arguments, parse_overrides

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
MINIMAL = "model: some/model\ndataset: some/dataset\noutput_dir: {}\n"


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., Path]:
    def write(more: str = "") -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(MINIMAL.format(tmp_path / "run") + more)
        return path

    return write


def load_error(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# -- configs


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    script, model_args, args = make_arguments(load_config(path))
    assert script.model.startswith("Qwen/")
    assert args.learning_rate < 1e-4 and args.num_generations == 8
    assert model_args.use_peft == ("lora" in path.stem)
    assert all(" # " in line or line.startswith("#") for line in path.read_text().splitlines() if line)


def test_the_7b_example_has_the_papers_batches() -> None:
    config = load_config(next(path for path in EXAMPLES if "7b" in path.stem))
    responses_per_update = 8 * config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    assert responses_per_update == 128 * config["num_generations"]
    assert config["generation_batch_size"] == 384 * config["num_generations"]


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} == {"qwen2_5_vl_7b", "qwen2_5_vl_32b", "qwen2_5_vl_3b_lora_one_gpu"}


def test_yaml_reads_scientific_notation(config_file: Callable[..., Path]) -> None:
    config = load_config(config_file("learning_rate: 1e-6\nmax_grad_norm: 1\nseed: 3\n"))
    assert config["learning_rate"] == 1e-6 and config["seed"] == 3
    assert make_arguments(config)[2].learning_rate == 1e-6


def test_overrides_win(config_file: Callable[..., Path]) -> None:
    config = load_config(config_file("learning_rate: 1e-6\n"), ["--learning-rate", "2e-6", "--keep_ratio=0.5"])
    assert config["learning_rate"] == 2e-6 and config["keep_ratio"] == 0.5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--a", "1", "--b-c=x"], {"a": 1, "b_c": "x"}),
        (["--flag"], {"flag": True}),
        (["--flag", "--a", "-1e-3"], {"flag": True, "a": -0.001}),
        (["--a", "[1, 2]", "--b={x: 1}"], {"a": [1, 2], "b": {"x": 1}}),
        (["--a=null", "--b="], {"a": None, "b": ""}),
        (["--a=--b"], {"a": "--b"}),
        ([], {}),
    ],
)
def test_parse_overrides(words: list[str], expected: dict[str, Any]) -> None:
    assert parse_overrides(words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a"], "command line: expected --key value, got 'a'"),
        (["--a", "1", "2"], "command line: expected --key value, got '2'"),
        (["-a", "1"], "command line: expected --key value, got '-a'"),
        (["--a", "[1"], "command line: --a takes a YAML value, got '[1'"),
    ],
)
def test_bad_overrides(words: list[str], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_overrides(words)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; did you mean learning_rate"),
        ("keep_ration: 1", "unknown key 'keep_ration'; did you mean keep_ratio"),
        ("model_name_or_path: x", "unknown key 'model_name_or_path'; did you mean model?"),
        ("resume_from_checkpoint: x", "unknown key 'resume_from_checkpoint'; did you mean resume?"),
        ("qqqqqqqq: x", "unknown key 'qqqqqqqq'"),
        ("learning_rate: fast", "learning_rate: got 'fast' (str), takes a number"),
        ("num_generations: 2.5", "num_generations: got 2.5 (float), takes a whole number"),
        ("seed: true", "seed: got True (bool), takes a whole number"),
        ("use_vllm: 1", "use_vllm: got 1 (int), takes true or false"),
        ("use_vllm: 'yes'", "use_vllm: got 'yes' (str), takes true or false"),
        ("dataset_split: 3", "dataset_split: got 3 (int), takes text"),
        ("reward_weights: [a]", "reward_weights: got ['a'] (list), takes a list (a number) or null"),
        ("dtype: bf16", "dtype: got 'bf16' (str), takes one of ['auto', 'bfloat16', 'float16', 'float32']"),
    ],
)
def test_a_bad_key_or_value_is_named(config_file: Callable[..., Path], line: str, expected: str) -> None:
    path = config_file()
    assert load_error(config_file(line)).startswith(f"{path}: {expected}")
    key, value = line.split(": ")
    if "takes text" not in expected:  # on the command line every word is a text
        assert load_error(config_file(), f"--{key}={value}").startswith(f"command line: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n- b\n", "must be keys and values (model: ...), got list"),
        ("", "must be keys and values (model: ...), got NoneType"),
        ("model: x\ndataset: y\n", "missing key 'output_dir'"),
        ("output_dir: x\ndataset: y\n", "missing key 'model'"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert load_error(path).startswith(f"{path}: {expected}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert load_error(tmp_path / "no.yaml").startswith(f"{tmp_path}/no.yaml: cannot be read")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("keep_ratio: 2", "config: keep_ratio: got 2, takes a number above 0 and at most 1"),
        ("algorithm: ppo", "config: algorithm: got 'ppo'"),
        ("num_generations: 1", "config: GRPO requires at least 2 generations"),
        ("max_pixels: -3", "config: max_pixels: got -3, takes a number of pixels from 1"),
        ("min_pixels: 0", "config: min_pixels: got 0, takes a number of pixels from 1"),
        ("{eval_dataset: x, eval_steps: 0}", "config: eval_steps: got 0, takes a number of steps"),
        ("{eval_dataset: x, eval_steps: -3}", "config: eval_steps: got -3, takes a number of steps"),
        ("{min_pixels: 10, max_pixels: 5}", "config: min_pixels: got 10, takes at most max_pixels, which is 5"),
        ("lora_target_modules: [q_proj, lm_head]", "config: lora_target_modules: must not name lm_head"),
        ("lora_modules_to_save: [lm_head]", "config: lora_modules_to_save: must not name lm_head"),
        ("bf16: true", "config: Your setup doesn't support bf16"),
    ],
)
def test_a_value_out_of_range_is_an_input_error(config_file: Callable[..., Path], line: str, expected: str) -> None:
    from transformers.utils import is_torch_bf16_gpu_available

    if line == "bf16: true" and is_torch_bf16_gpu_available():
        pytest.skip("this device has bfloat16")
    config = load_config(config_file()) | yaml.safe_load(line)
    with pytest.raises(InputError) as caught:
        make_arguments(config)
    assert str(caught.value).startswith(expected)


def test_one_lora_target_stays_a_name(config_file: Callable[..., Path]) -> None:
    from trl import get_peft_config

    config = load_config(config_file("use_peft: true\nlora_target_modules: [q_proj]\n"))
    assert get_peft_config(make_arguments(config)[1]).target_modules == {"q_proj"}


def test_what_is_written_into_options_does_not_reach_the_config(tmp_path: Path) -> None:
    """transformers puts the number of accumulated micro-batches into `gradient_accumulation_kwargs`, and refuses it."""
    config = yaml.safe_load(MINIMAL.format(tmp_path))
    config["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    accelerator = make_arguments(config)[2].accelerator_config
    accelerator.gradient_accumulation_kwargs["num_steps"] = 2  # type: ignore
    assert config["accelerator_config"] == {"gradient_accumulation_kwargs": {"sync_each_batch": True}}


def test_model_init_kwargs_are_joined(config_file: Callable[..., Path]) -> None:
    config = load_config(config_file("attn_implementation: sdpa\nmodel_init_kwargs: {use_kernels: true}\n"))
    kwargs = make_arguments(config)[2].model_init_kwargs
    assert kwargs == {"revision": "main", "attn_implementation": "sdpa", "dtype": "float32", "use_kernels": True}


# -- what is refused before any step


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    Image.new("RGB", (56, 28)).save(tmp_path / "a.png")
    path = tmp_path / "train.jsonl"
    rows = [{"problem": f"{n}+1?", "answer": str(n + 1), "images": ["a.png"]} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_error(**config: Any) -> str:
    with pytest.raises(InputError) as caught:
        train(config)
    return str(caught.value)


def test_what_is_not_installed_is_said_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setattr(transformers.utils, "is_liger_kernel_available", lambda: False)
    config = {"model": "no/model", "dataset": "no/dataset", "output_dir": "never-written", "use_cpu": True}
    assert train_error(**config, report_to=["tensorboard", "mlflow"]).startswith(
        "report_to: got 'mlflow', which is not installed"
    )
    missing = train_error(**config, report_to="none", use_liger_kernel=True)
    assert missing == "use_liger_kernel: Liger is not installed: pip install 'vppo-kernels[liger]'"


def test_train_checks_configs_from_python(tmp_path: Path) -> None:
    assert train_error(model="m", dataset="d", outputdir="o").startswith("config: unknown key 'outputdir'")
    assert train_error(model="m", dataset="d") == "config: missing key 'output_dir'"


def test_a_missing_model_is_named(tmp_path: Path, problems: Path) -> None:
    message = train_error(model=str(tmp_path / "no-model"), dataset=str(problems), output_dir=str(tmp_path / "run"))
    assert message.startswith(f"model: {tmp_path}/no-model")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_occupied_output_dir_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    message = train_error(model="no/model", dataset="no.jsonl", output_dir=str(tmp_path / "run"))
    assert message.startswith(f"output_dir: {tmp_path}/run already holds a run")


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    resume = str(tmp_path / "checkpoint-3")
    message = train_error(model="no/model", dataset="no.jsonl", output_dir=str(tmp_path / "run"), resume=resume)
    assert message.startswith(f"resume: {resume} is not a complete checkpoint (it has no readable trainer_state.json)")


# -- one real run


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's model untrained, sixteen problems (four without picture), a config for two steps."""
    from vppo.demo.model import build_model, build_processor

    folder = tmp_path_factory.mktemp("tiny")
    processor = build_processor()
    build_model(processor, seed=0).save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    rows = []
    for number in range(16):
        Image.effect_noise((84, 28), 10 * number).save(folder / f"{number}.png")
        images = [f"{number}.png"] if number % 4 else []
        rows.append({"problem": f"{number}+1?", "answer": number + 1, "images": images})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "letters_reward.py").write_text(
        "def letters(completions, answer, **_):\n"
        "    return [sum(map(ord, c[0]['content'])) % 7 + len(a) for c, a in zip(completions, answer)]\n"
    )
    never_answered = sorted(set(processor.tokenizer.all_special_ids) - {processor.tokenizer.eos_token_id})
    config = {
        "model": str(folder / "start"),
        "dataset": str(folder / "train.jsonl"),
        "output_dir": str(folder / "run"),
        "reward": "letters_reward:letters",
        "system_prompt": "",
        "instruction": "",
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "generation_kwargs": {"suppress_tokens": never_answered},
        "max_steps": 2,
        "save_steps": 2,
        "learning_rate": 1e-3,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def run_tiny(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Path:
    monkeypatch.chdir(folder)
    return train(load_config(folder / "config.yaml", overrides))


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--dataset=no.jsonl", "no.jsonl: no such dataset file or folder"),
        ("--reward_weights=[1.0, 2.0]", "reward_weights: got 2 weights for 1 reward"),
        ("--eval_dataset=no.jsonl", "no.jsonl: no such dataset file or folder"),
        ("--model=text", "model: text: no processor for images could be loaded"),
    ],
)
def test_nothing_is_written_before_everything_is_checked(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, override: str, expected: str
) -> None:
    monkeypatch.chdir(tiny_run)
    from transformers import LlamaConfig

    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained("text")
    with pytest.raises(InputError) as caught:
        run_tiny(tiny_run, monkeypatch, "--output_dir=refused", override)
    assert str(caught.value).startswith(expected)
    assert not Path("refused", "config.yaml").exists() and not Path("refused", "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("override", "package", "named"),
    [("--attn_implementation=flash_attention_2", "flash_attn", "FlashAttention2"), ("--use_vllm", "vllm", "vLLM")],
)
def test_an_extra_that_is_not_installed_is_named(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, override: str, package: str, named: str
) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(InputError, match=named):
        run_tiny(tiny_run, monkeypatch, "--output_dir=refused", override)


def mixed_data(folder: Path) -> Path:
    """The sixteen problems between rows that cannot be used."""
    (folder / "text.png").write_text("no picture")
    Image.new("RGB", (4000, 10)).save(folder / "long.png")
    bad = [
        {"problem": "x?", "answer": "", "images": []},
        {"problem": "x?", "answer": "1", "images": ["text.png"]},
        {"problem": "x?", "answer": "1", "images": ["long.png"]},
        {"problem": "<|image_pad|>?", "answer": "1", "images": []},
    ]
    good = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    path = folder / "mixed.jsonl"
    path.write_text(
        "".join(
            good[:5]
            + [json.dumps(row) + "\n" for row in bad[:2]]
            + good[5:]
            + [json.dumps(row) + "\n" for row in bad[2:]]
        )
    )
    return path


def test_bad_rows_are_left_out_and_listed(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = mixed_data(tiny_run)
    words = [f"--dataset={path}", "--bad_rows=skip", "--max_steps=4"]
    whole = run_tiny(tiny_run, monkeypatch, f"--output_dir={tmp_path / 'whole [/x] [red]'}", *words)
    said = capsys.readouterr().out
    assert f"Skipped 4 rows, listed in {whole}/skipped_rows.jsonl; the first: {path}, row 6, column 'answer'" in said
    listed = [json.loads(line) for line in (whole / "skipped_rows.jsonl").read_text().splitlines()]
    assert [(row["file"], row["row"], row["column"]) for row in listed] == [
        (str(path), 6, "answer"),
        (str(path), 7, "images"),
        (str(path), 19, "images"),
        (str(path), 20, "problem"),
    ]
    plain = run_tiny(tiny_run, monkeypatch, f"--output_dir={tmp_path / 'plain'}", "--max_steps=4")
    assert metrics(whole) == metrics(plain)  # what is left is trained on as if the rest had never been there
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns("model", "checkpoint-4"))
    Image.new("RGB", (56, 28)).save(tiny_run / "text.png")  # put right since
    resumed = run_tiny(tiny_run, monkeypatch, f"--output_dir={killed}", "--resume", *words)
    assert metrics(resumed) == metrics(whole)
    assert (resumed / "skipped_rows.jsonl").read_text() == (whole / "skipped_rows.jsonl").read_text()


def test_a_bad_row_is_an_error_before_the_first_step(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mixed_data(tiny_run)
    with pytest.raises(InputError, match=r"mixed.jsonl, row 6, column 'answer': it is empty"):
        run_tiny(tiny_run, monkeypatch, f"--output_dir={tmp_path / 'run'}", f"--dataset={path}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--per_device_train_batch_size=68"], "dataset: 16 rows, takes 17: a step needs generation_batch_size / "),
        (["--max_steps=-1", "--num_train_epochs=0"], "num_train_epochs: got 0, takes a number above 0"),
    ],
)
def test_a_run_without_a_step_is_refused(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    with pytest.raises(InputError) as caught:
        run_tiny(tiny_run, monkeypatch, f"--output_dir={tmp_path / 'run'}", *words)
    assert str(caught.value).startswith(expected)
    assert not (tmp_path / "run").exists()


def test_two_steps_end_to_end(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    from vppo.loading import load_processor

    run = run_tiny(tiny_run, monkeypatch)
    assert [line["step"] for line in metrics(run)] == [1, 2]
    assert all(line["vppo/dependency_mean"] > 0 and "reward" in line for line in metrics(run))
    before, after = weights(tiny_run / "start"), weights(run / "model")
    assert "Spotlight on Token Perception" in (run / "model" / "README.md").read_text(encoding="utf-8")
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)
    Qwen2_5_VLForConditionalGeneration.from_pretrained(run / "model")
    assert (
        load_processor(str(run / "model")).image_processor.size
        == load_processor(str(tiny_run / "start")).image_processor.size
    )
    again = load_config(run / "config.yaml")
    assert again["divergence"] == "kl" and again["scale_min"] == 0.9 and again["max_steps"] == 2
    make_arguments(again)


@pytest.mark.parametrize("more", [[], ["--use_peft", "--lora_r=4", "--lora_dropout=0"]], ids=["whole", "lora"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    more = [*more, "--max_steps=4"]
    whole = run_tiny(tiny_run, monkeypatch, f"--output_dir={tmp_path / 'whole'}", *more)
    killed = tmp_path / "killed"  # after its second step was saved, while the fourth was being saved
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns("model", "trainer_state.json"))
    shutil.copy(whole / "checkpoint-2" / "trainer_state.json", killed / "checkpoint-2")
    resumed = run_tiny(tiny_run, monkeypatch, f"--output_dir={killed}", "--resume", *more)
    assert metrics(resumed) == metrics(whole)
    expected, got = weights(whole / "model"), weights(resumed / "model")
    assert expected.keys() == got.keys() and all((expected[name] == got[name]).all() for name in expected)


def test_lora_never_reaches_the_head(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = "--lora_target_modules=.*(q_proj|head)"
    run = run_tiny(tiny_run, monkeypatch, f"--output_dir={tmp_path}", "--use_peft", pattern, "--max_steps=1")
    names = weights(run / "model").keys()
    assert any("q_proj" in name for name in names) and not any("lm_head" in name for name in names)
