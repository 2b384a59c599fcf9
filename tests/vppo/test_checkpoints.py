import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as serialized

from vppo import manifest
from vppo.checkpoints import drop_older, last_complete_checkpoint, named_checkpoint, restore_weights, saved_step
from vppo.errors import InputError


def save(output_dir: Path, name: str, state: str) -> Path:
    folder = output_dir / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(serialized({"weight": torch.zeros(1)}))
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


def test_a_checkpoint_and_a_run_can_be_named(tmp_path: Path) -> None:
    first, newest = (save(tmp_path / "run", f"checkpoint-{step}", whole(step)) for step in (9, 10))
    assert named_checkpoint(str(first)) == first and named_checkpoint(str(tmp_path / "run")) == newest
    save(tmp_path / "run", "checkpoint-11", "")
    assert named_checkpoint(tmp_path / "run") == newest
    for name, reason in (
        ("missing", "there is no such folder"),
        ("", "it has no readable trainer_state.json"),
        ("run/checkpoint-11", "it has no readable trainer_state.json"),
    ):
        with pytest.raises(InputError) as caught:
            named_checkpoint(tmp_path / name)
        assert str(caught.value) == (
            f"resume: {tmp_path / name} is not a complete checkpoint ({reason}); takes a folder checkpoint-N, or that "
            "of a run"
        )
    save(tmp_path / "broken", "checkpoint-1", "")
    with pytest.raises(InputError, match=f"resume: no checkpoint in {tmp_path}/broken is complete"):
        named_checkpoint(tmp_path / "broken")


def test_older_ones_go_and_broken_ones_before_them(tmp_path: Path) -> None:
    for step in (1, 2, 3, 5):
        begun = save(tmp_path, f"checkpoint-{step}", whole(step))
    manifest.begin(begun)  # of a save at step 5 that was cut short, before the run went on from step 3
    newest = save(tmp_path, "checkpoint-4", whole(4))

    def left() -> list[str]:
        return sorted(path.name.removeprefix("checkpoint-") for path in tmp_path.iterdir())

    for limit in (None, 0, 5):
        drop_older(newest, limit, None)
        assert left() == ["1", "2", "3", "4", "5"]
    drop_older(newest, 4, str(tmp_path / "earlier" / "checkpoint-9"))  # which counts in its own folder
    assert left() == ["1", "2", "3", "4"]
    drop_older(newest, 2, str(tmp_path / "checkpoint-1"))
    assert left() == ["1", "4"]
    drop_older(newest, 1, str(tmp_path / "checkpoint-1"))
    assert left() == ["1", "4"]
    drop_older(newest, 1, None)
    assert left() == ["4"]


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
