import json
from pathlib import Path

import pytest

from vppo.checkpoints import last_complete_checkpoint, saved_step


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
