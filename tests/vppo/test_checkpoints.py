import json
from pathlib import Path

import pytest

from vppo.checkpoints import last_complete_checkpoint, restore_weights, saved_step


def save(output_dir: Path, name: str, state: str) -> Path:
    folder = output_dir / name
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(state)
    return folder


def whole(step: int) -> str:
    return json.dumps({"global_step": step})


def test_the_newest_whole_checkpoint_is_chosen_by_number(tmp_path: Path) -> None:
    save(tmp_path, "checkpoint-9", whole(9))
    newest = save(tmp_path, "checkpoint-10", whole(10))
    assert last_complete_checkpoint(tmp_path) == newest
    assert saved_step(newest) == 10


@pytest.mark.parametrize("debris", ["", whole(20)[:-3], "[]", whole(19), '{"epoch": 1.0}'])
def test_what_a_crash_left_is_passed_over(tmp_path: Path, debris: str) -> None:
    good = save(tmp_path, "checkpoint-10", whole(10))
    save(tmp_path, "checkpoint-20", debris)
    (tmp_path / "checkpoint-30").mkdir()  # killed before the state was written
    assert last_complete_checkpoint(tmp_path) == good


def test_other_names_are_not_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, "checkpoint-best", whole(5))
    save(tmp_path, "model-7", whole(7))
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "missing") is None


def test_weights_come_back_under_any_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from support.families import build

    model, _ = build("qwen2_5_vl", seed=0)
    other, _ = build("qwen2_5_vl", seed=1)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() != other.state_dict().keys()  # the hub's names: what the trainer's own resuming trips over
    assert restore_weights(other, tmp_path)
    expected, got = model.state_dict(), other.state_dict()
    assert all((expected[name] == got[name]).all() for name in expected)


def test_weights_in_other_forms_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    assert not restore_weights(None, tmp_path)
