"""Completions as rows, tables, on a terminal and at the loggers."""

from __future__ import annotations

import io
import os
import random
import sqlite3
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from support import families
from support.runs import rows as problems
from support.runs import trainer, varied_reward

from vppo.monitoring.completion_view import chosen, show
from vppo.monitoring.completions import CompletionLog, images_of, plain_text
from vppo.monitoring.loggers import log_completions, markdown

NAN = float("nan")
PICTURE = families.picture(0)


def asked(text: str, *images: Any) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def generation(*texts: str, image: Any = PICTURE, extra: dict[str, list[Any]] | None = None) -> dict[str, Any]:
    """What TRL gathers of a generation: rollouts of one prompt."""
    return {
        "images": [],
        "prompt": [asked("How much?", *([image] if image else [])) for _ in texts],
        "completion": [said(text) for text in texts],
        "advantages": [0.5] * len(texts),
        "rewards": defaultdict(list, {"good": [float(len(text)) for text in texts]}),
        "extra": defaultdict(list, extra or {}),
    }


def row(prompt: Any, completion: Any, **numbers: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **numbers}


def shown(rows: list[dict[str, Any]], width: int, title: str = "Step 3") -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    show(console, rows, title)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


# -- rows


def test_rows_over_generations() -> None:
    log = CompletionLog(["good"], rows=3, images=0)
    logs = generation("a", "bb", extra={"note": ["x", "y"]})
    log.add(logs, {"dependency": [0.25, NAN]})
    assert not logs["prompt"] and not logs["rewards"] and not logs["extra"]
    log.add(generation("ccc", "dddd"), {"dependency": [0.5, 1.0], "alpha": [0.9, 1.1]})
    table = log.table(7)
    assert [text[0]["content"] for text in table["completion"]] == ["bb", "ccc", "dddd"]
    assert table["good"].tolist() == [2, 3, 4] and table["step"].tolist() == [7] * 3
    assert table["dependency"].isna().tolist() == [True, False, False]
    assert table["alpha"].isna().tolist() == [True, False, False]
    assert table["note"].tolist()[0] == "y" and table["note"].isna().tolist() == [False, True, True]
    assert list(table.columns)[:3] == ["step", "prompt", "completion"]


def test_a_column_of_the_wrong_length_is_named() -> None:
    log = CompletionLog(["good"], rows=None, images=0)
    with pytest.raises(ValueError, match="log_extra: 'note' got 1 values for 2 completions"):
        log.add(generation("a", "b", extra={"note": ["x"]}), {})


def test_only_the_first_rows_keep_images() -> None:
    log = CompletionLog(["good"], rows=None, images=3)
    for _ in range(2):
        log.add(generation("a", "b"), {})
    assert [len(images_of(row["prompt"])) for row in log.rows] == [1, 1, 1, 0]
    assert log.pictures() == [[PICTURE]] * 3
    assert images_of(log.table(1)["prompt"][0]) == []
    assert log.table(1)["prompt"][3][0]["content"][0] == {"type": "image"}


def test_messages_of_several_shapes_fit_one_file(tmp_path: Path) -> None:
    """Text and lists of parts, tool calls with arguments of several types: Arrow takes neither mix."""
    log = CompletionLog(["good"], rows=None, images=0)
    logs = generation("a", "b", image=None)
    logs["prompt"][1] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "How much?"}]
    calls = [{"function": {"name": "zoom", "arguments": arguments}} for arguments in ({"x": 1}, {"x": "left"})]
    logs["completion"][1] = [{"role": "assistant", "content": None, "tool_calls": calls}]
    log.add(logs, {})
    log.write(tmp_path / "new" / "table.parquet", 1)
    table = pd.read_parquet(tmp_path / "new" / "table.parquet")
    assert table["prompt"][1][1]["content"][0]["text"] == "How much?"
    assert '"x": "left"' in table["completion"][1][0]["tool_calls"]


def test_reward_metrics() -> None:
    log = CompletionLog(["good", "kind"], rows=None, images=0)
    logs = generation("a", "bb", "ccc", "dddd")
    logs["rewards"] = {"good": [1.0, 2.0, NAN, NAN], "kind": [1.0, NAN, 4.0, NAN]}
    log.add(logs, {})
    found = log.reward_metrics([1.0, 0.5])
    assert found["rewards/good/mean"] == 1.5 and found["rewards/kind/mean"] == 2.5
    assert found["reward"] == pytest.approx((1.5 + 2 + 2) / 3)
    assert CompletionLog(["good"], rows=None, images=0).reward_metrics([1.0]) == {}


# -- a terminal


@pytest.mark.parametrize("width", [80, 140])
def test_a_terminal_shows_everything_within_its_width(width: int) -> None:
    text = "The angle at C is a right angle because AB is a diameter, so it is 55 degrees. " * 3
    numbers = {"accuracy_reward": 1.0, "format_reward": 0.0, "length_penalty": -0.25, "advantage": 0.7071}
    prompt = asked(f"What is angle ABC? {text}", PICTURE)
    rows = [
        row(prompt, said(text), **numbers, dependency=0.123456, kept_fraction=0.4, alpha=1.1),
        row(prompt, said("I guess 5"), **numbers, dependency=NAN, kept_fraction=NAN, alpha=None),
    ]
    lines = shown(rows, width)
    whole = "\n".join(lines)
    assert max(map(len, lines)) <= width and "…" not in whole
    assert whole.count("What is angle ABC?") == 1 and "[image]" in whole
    for name in ("accuracy_reward      1", "length_penalty  -0.25", "dependency  0.123", "alpha      -"):
        assert name in whole
    starts = [line.index("format_reward") for line in lines if "format_reward" in line]
    assert len(starts) == 2 and len(set(starts)) == 1


def test_what_a_model_writes_cannot_steer_the_terminal() -> None:
    lines = shown([row("a [bold]prompt[/bold]", "\x1b[2J[red]no[/red]\r\x07 \n end", good=1.0)], 80)
    whole = "\n".join(lines)
    assert "a [bold]prompt[/bold]" in whole and "[red]no[/red]" in whole
    assert not any(code in whole for code in ("\x1b", "\r", "\x07"))
    assert "(empty)" in "\n".join(shown([row(asked("?"), said(""), good=1.0)], 80))


def test_conversations_with_tools_as_text() -> None:
    talk = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "zoom", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "here"}]},
        {"role": "assistant", "content": "8"},
    ]
    assert plain_text(talk) == [("assistant", 'zoom({"x": 1})'), ("tool", "[image] here"), ("assistant", "8")]
    whole = "\n".join(shown([row(asked("?"), talk, good=1.0)], 80))
    assert "tool: [image] here" in whole and "assistant: 8" in whole


def test_which_rows_are_shown() -> None:
    rows: list[dict[str, Any]] = [{"number": n} for n in range(20)]
    random.seed(0)
    before = random.getstate()
    some = chosen(rows, 5, step=1)
    assert random.getstate() == before
    numbers = [row["number"] for row in some]
    assert len(numbers) == 5 and numbers == sorted(numbers) and some == chosen(rows, 5, step=1)
    assert some != chosen(rows, 5, step=2)
    assert chosen(rows, None, 1) == chosen(rows, 20, 1) == rows and chosen(rows, 0, 1) == []
    assert shown([], 80) == []


# -- loggers


def test_a_table_in_markdown_is_text() -> None:
    table = pd.DataFrame({"text": ["<think>|*a*|</think>\nb", "`c`"], "number": [0.123456, NAN]})
    assert markdown(table).splitlines() == [
        "| text | number |",
        "| --- | --- |",
        r"| &lt;think&gt;\|\*a\*\|&lt;/think&gt;<br>b | 0.1235 |",
        r"| \`c\` |  |",
    ]


TABLE = [
    row(asked("with", PICTURE), said("a"), good=1.0, dependency=0.25),
    row(asked("without"), said("b"), good=0.0, dependency=NAN),
]


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages of different parts are refused by its tables; text is not."""
    wandb = pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    log_completions(["wandb"], [], "completions", 1, TABLE, [[PICTURE], []])  # no run: nothing happens
    wandb.init(project="test", dir=str(tmp_path))
    log_completions(["wandb"], [], "completions", 1, TABLE, [[PICTURE], []])
    log_completions(["wandb"], [], "eval/completions", 1, TABLE, [])
    wandb.finish()
    files = sorted(tmp_path.rglob("*.table.json"))
    assert len(files) == 2
    first = files[0].read_text()
    assert all(word in first for word in ("[image] with", "without", "dependency", "image", "0.25"))


def test_trackio(tmp_path: Path) -> None:
    """In a process of its own: it settles on its folder when it is first imported, which TRL does."""
    pytest.importorskip("trackio")
    script = (
        "import trackio\n"
        "from test_completion_tables import PICTURE, TABLE, log_completions\n"
        "trackio.init(project='test')\n"
        "log_completions(['trackio'], [], 'completions', 1, TABLE, [[PICTURE], []])\n"
        "trackio.finish()\n"
    )
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path), "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    with sqlite3.connect(tmp_path / "test.db") as database:
        (stored,) = database.execute("select metrics from metrics").fetchone()
    assert b"[image] with" in stored and b"dependency" in stored and b"trackio.image" in stored
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a whole training, with an evaluation."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run = trainer(
        tmp_path, problems(2), eval_data=problems(1), log_completions=True, report_to=["tensorboard"], max_steps=1,
        reward=varied_reward, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4,
    )  # fmt: skip
    run.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for key in ("completions", "eval/completions"):
        text = events.Tensors(f"{key}/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "dependency" in text and "How much" in text and len(text.splitlines()) == 2 + 4
    assert "eval/vppo/dependency_mean" in events.Tags()["scalars"]
