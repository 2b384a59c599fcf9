import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.families import build, picture
from support.runs import options, rows, varied_reward

import vppo.loading
from vppo import VPPOConfig, VPPOTrainer
from vppo.errors import InputError
from vppo.loading import load_model, load_processor
from vppo.trl_seams import TRLTrainer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved models of three kinds, and one with a tokenizer only."""
    saved = {}
    for name in ("qwen2_5_vl", "qwen3_vl", "llava"):
        model, processor = build(name)
        saved[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(saved[name])
        processor.save_pretrained(saved[name])
    saved["text"] = tmp_path_factory.mktemp("text")
    model.config.text_config.save_pretrained(saved["text"])
    processor.tokenizer.save_pretrained(saved["text"])
    return saved


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_a_saved_model_gives_the_processor_it_was_saved_with(folders: dict[str, Path], name: str) -> None:
    _, before = build(name)
    loaded = load_processor(str(folders[name]))
    message = {"role": "user", "content": [{"type": "image", "image": picture(0)}, {"type": "text", "text": "1+1?"}]}
    one, two = (
        processor.apply_chat_template([[message]], tokenize=True, return_dict=True, return_tensors="pt")
        for processor in (before, loaded)
    )
    assert one.keys() == two.keys()
    assert all((one[key] == two[key]).all() for key in one)
    assert loaded.tokenizer.padding_side == "left" and type(loaded).__name__ == type(before).__name__


def test_the_layout_of_checkpoints_on_the_hub(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen2_5_vl"], folder)
    stored = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    del stored["size"]
    stored |= {"min_pixels": 3136, "max_pixels": 12845056, "processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(stored))
    (folder / "processor_config.json").unlink()
    assert load_processor(str(folder)).image_processor.size["longest_edge"] == 12845056


def test_pixel_limits(folders: dict[str, Path], tmp_path: Path) -> None:
    def patches(processor: Any) -> int:
        return processor.image_processor(picture(0, (280, 280)), return_tensors="pt")["image_grid_thw"].prod().item()

    folder = str(folders["qwen2_5_vl"])
    assert patches(load_processor(folder)) == 64  # the tiny processor's own limit: 16 cells of 2 x 2 patches
    limited = load_processor(folder, min_pixels=784, max_pixels=4 * 784)
    assert patches(limited) == 16
    limited.save_pretrained(tmp_path)
    shutil.copy(f"{folder}/config.json", tmp_path)
    assert patches(load_processor(str(tmp_path))) == 16
    assert patches(load_processor(folder, min_pixels=100 * 784, max_pixels=200 * 784)) == 400


def test_a_model_without_pixel_limits(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"max_pixels: CLIPImageProcessor.* has no limits on pixels to set"):
        load_processor(str(folders["llava"]), max_pixels=1000)


def test_models_that_cannot_look(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"model: {folders['text']}: no processor for images could be loaded"):
        load_processor(str(folders["text"]))
    with pytest.raises(InputError, match=f"model: {tmp_path}/missing: no such folder"):
        load_processor(str(tmp_path / "missing"))
    with pytest.raises(InputError, match=f"model: {tmp_path}: cannot be loaded"):
        load_processor(str(tmp_path))


def built(model: Any, path: Path, **changes: Any) -> VPPOTrainer:
    """A trainer that was not given a processor."""
    args = VPPOConfig(**options(path / "run", **changes))
    return VPPOTrainer(model=model, reward_funcs=varied_reward, args=args, train_dataset=Dataset.from_list(rows(4)))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava"])
@pytest.mark.parametrize("algorithm", ["vppo", "grpo"])
def test_the_trainer_finds_the_processor_of_a_folder(
    folders: dict[str, Path], name: str, algorithm: str, tmp_path: Path
) -> None:
    run = built(str(folders[name]), tmp_path, algorithm=algorithm, max_steps=1)
    assert type(run.processing_class).__name__ == type(build(name)[1]).__name__
    assert run.processing_class.tokenizer.padding_side == "left" and run._is_vlm
    run.train()
    assert run.state.global_step == 1 and (algorithm == "grpo" or run.state.log_history[0]["vppo/dependency_mean"] > 0)


def test_the_trainer_finds_the_processor_of_a_loaded_model(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(str(folders["qwen2_5_vl"]), device="cpu")
    assert type(built(model, tmp_path).processing_class).__name__ == "Qwen2_5_VLProcessor"
    nameless, _ = build("qwen2_5_vl")
    with pytest.raises(InputError, match=r"processing_class: got None.* no name_or_path"):
        built(nameless, tmp_path)


def test_what_the_trainer_asks_the_hub_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(vppo.loading, "load_processor", lambda name, **options: asked.append((name, options)))
    monkeypatch.setattr(TRLTrainer, "__init__", lambda *args, **kwargs: 1 / 0)
    args = {"trust_remote_code": True, "model_init_kwargs": {"revision": "v2"}}
    for model, revision in (("org/model", "v2"), (build("llava")[0], "main")):
        if not isinstance(model, str):
            model.config._name_or_path = "org/other"
        with pytest.raises(ZeroDivisionError):
            built(model, tmp_path, **args)
        expected = model if isinstance(model, str) else "org/other"
        assert asked.pop() == (expected, {"revision": revision, "trust_remote_code": True})


def test_the_trainer_refuses_a_model_that_cannot_look(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model: .*: no processor for images could be loaded"):
        built(str(folders["text"]), tmp_path)
