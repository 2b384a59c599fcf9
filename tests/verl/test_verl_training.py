"""verl's own trainer with VPPO: the same numbers from any number of workers, nodes and layouts, and after a stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_torchvision  # noqa: F401  (before transformers)
import pytest
import torch
from transformers import AutoProcessor

from vppo_kernels import vppo_advantages

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
MODE = "trainer.v1.trainer_mode=vppo"
PACKED = ("actor_rollout_ref.model.use_remove_padding=True",)
ULYSSES = (
    *PACKED,
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
    "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2",
)
SUMMED = {"rtol": 1e-6, "atol": 1e-7}  # the mean over rows, which a test sorts, is summed in another order
Run = tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


def probed(train: Callable[..., Any], out: Path, *overrides: str, mode: str = MODE, **options: int) -> Run:
    """Each step's metrics, and its rows as their advantages were shaped, in an order of their own."""
    out.mkdir()
    metrics = train(out, mode, *overrides, PROBE=str(out), BENCH_MODULES="bench_probe", **options)
    batches = [torch.load(path, weights_only=False) for path in sorted(out.glob("*.pt"))]
    return metrics, [sorted(rows, key=lambda row: (row["index"], row["responses"].tolist())) for rows in batches]


@pytest.fixture(scope="module")
def one_worker(train: Callable[..., Any], folder: Path) -> Run:
    save = ("trainer.save_freq=1", f"trainer.default_local_dir={folder / 'checkpoints'}")
    return probed(train, folder / "one", *save)


@pytest.fixture(scope="module")
def two_nodes(train: Callable[..., Any], folder: Path) -> Run:
    return probed(train, folder / "two", *ULYSSES, nodes=2)


def norms(run: Run) -> list[float]:
    return [step["actor/grad_norm"] for step in run[0]]


def padded(rows: list[dict[str, Any]], name: str) -> torch.Tensor:
    values = [row[name].float() for row in rows]
    if name == "dependency":
        values = [row[name][-len(row["responses"]) - 1 : -1] for row in rows]
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)


def test_advantages_are_those_of_the_whole_batch(one_worker: Run, tiny: Path) -> None:
    image = AutoProcessor.from_pretrained(tiny).image_token_id
    rows = one_worker[1][0]
    # of the first step's problems, the rewards of 2 are all alike, and 3 is text alone
    has_image = torch.tensor([row["index"] in (0, 1) for row in rows])
    assert [bool((row["prompts"] == image).any()) for row in rows] == [row["index"] != 3 for row in rows]
    mask, dependency = padded(rows, "response_mask").bool(), padded(rows, "dependency")
    assert ((dependency >= 0).all(1) == has_image).all()
    expected = vppo_advantages(padded(rows, "returns"), dependency, mask, has_image=has_image)
    assert (expected != padded(rows, "returns")).any()
    torch.testing.assert_close(padded(rows, "advantages"), expected, **SUMMED)


def test_metrics_have_the_names_of_the_other_trainer(one_worker: Run) -> None:
    step = one_worker[0][0]
    names = {name for name in step if name.startswith("vppo/")}
    quantiles = {f"vppo/dependency_q{percent}" for percent in (50, 90, 99)}
    factors = {f"vppo/alpha_{which}" for which in ("min", "mean", "max", "std")}
    kept = {"vppo/kept_fraction", "vppo/kept_dependency_fraction", "vppo/kept_unseen_fraction"}
    others = {"vppo/dependency_mean", "vppo/responses_without_kept", "vppo/scored_fraction", "vppo/clip_ratio_kept"}
    gap = {"vppo/sampler_gap_mean", "vppo/sampler_gap_max"}
    assert names == quantiles | factors | kept | others | gap
    # the sampler is transformers' own, of the same weights in float32
    assert 0 < step["vppo/sampler_gap_mean"] <= step["vppo/sampler_gap_max"] < 1e-4
    assert step["vppo/scored_fraction"] == 0.5
    assert step["vppo/alpha_min"] == pytest.approx(0.9)
    assert step["vppo/alpha_mean"] == pytest.approx(1.0, abs=1e-5)


def test_two_nodes_packed_and_with_sequence_parallelism_train_the_same(one_worker: Run, two_nodes: Run) -> None:
    assert norms(two_nodes) == pytest.approx(norms(one_worker), rel=1e-4)
    for one, two in zip(one_worker[1], two_nodes[1], strict=True):
        assert [row["responses"].tolist() for row in one] == [row["responses"].tolist() for row in two]
    for name in ("dependency", "advantages"):
        torch.testing.assert_close(padded(two_nodes[1][0], name), padded(one_worker[1][0], name), rtol=1e-4, atol=1e-6)


def test_two_nodes_shape_over_the_batch_of_both(two_nodes: Run) -> None:
    for rows in two_nodes[1]:
        mask, dependency = padded(rows, "response_mask").bool(), padded(rows, "dependency")
        expected = vppo_advantages(padded(rows, "returns"), dependency, mask, has_image=(dependency >= 0).all(1))
        torch.testing.assert_close(padded(rows, "advantages"), expected, **SUMMED)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(one_worker: Run, train: Any, folder: Path) -> None:
    resume = (
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={folder / 'checkpoints' / 'global_step_1'}",
    )
    resumed = probed(train, folder / "resumed", *resume)
    assert norms(resumed) == pytest.approx(norms(one_worker)[1:], rel=1e-5)
    for name in ("dependency", "advantages"):
        torch.testing.assert_close(padded(resumed[1][0], name), padded(one_worker[1][1], name), rtol=1e-5, atol=1e-7)


def test_switched_off_it_is_stock_verl(train: Any, tiny: Path, folder: Path) -> None:
    shown = (f"data.train_files={tiny / 'shown.parquet'}", "data.train_batch_size=3", f"{ACTOR}.ppo_mini_batch_size=3")
    off = [f"+trainer.v1.vppo.{name}=1" for name in ("keep_ratio", "scale_min", "scale_max")]
    off += ["+trainer.v1.vppo.perturbation_scope=rollout", "+trainer.v1.vppo.patch_probability=0"]
    stock, ours = train(folder / "stock", *shown), train(folder / "off", MODE, *off, *shown)
    assert len(stock) == len(ours) == 2
    for one, other in zip(stock, ours, strict=True):
        for name in ("actor/grad_norm", "actor/entropy", "actor/pg_loss", "actor/ppo_kl", "critic/rewards/mean"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
        assert "vppo/kept_fraction" in other and "vppo/kept_fraction" not in one
    assert (folder / "off" / "log").read_text().count("The perturbed view changes nothing") == 1
    assert ours[0]["vppo/alpha_min"] == ours[0]["vppo/alpha_max"] == ours[0]["vppo/kept_fraction"] == 1


def test_the_asynchronous_trainer_shapes_whole_batches_too(train: Any, folder: Path) -> None:
    mode = "trainer.v1.trainer_mode=vppo_colocate_async"
    dynamic = (
        f"{ACTOR}.use_dynamic_bsz=True", f"{ROLLOUT}.log_prob_use_dynamic_bsz=True",
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu=160",
        "+trainer.v1.vppo.nll_coef=0.06", "+trainer.v1.vppo.divergence=prob_drop", *PACKED,
    )  # fmt: skip
    metrics, batches = probed(train, folder / "async", *dynamic, mode=mode)
    assert len(metrics) == len(batches) == 2
    for step, rows in zip(metrics, batches, strict=True):
        mask, dependency = padded(rows, "response_mask").bool(), padded(rows, "dependency")
        live = {row["index"] for row in rows if row["returns"].any()} - {3, 7, 11, 15}  # which are text alone
        has_image = torch.tensor([row["index"] in live for row in rows])
        assert step["vppo/scored_fraction"] == has_image.float().mean()
        assert (dependency[has_image] < 0).any()  # where the perturbed view makes a token more probable
        expected = vppo_advantages(padded(rows, "returns"), dependency, mask, has_image=has_image)
        torch.testing.assert_close(padded(rows, "advantages"), expected, **SUMMED)


def test_the_released_recipe_finds_factors_in_its_updates(train: Any, folder: Path) -> None:
    two_updates = (f"{ACTOR}.ppo_mini_batch_size=2", f"{ACTOR}.ppo_micro_batch_size_per_gpu=2")
    metrics, batches = probed(train, folder / "official", "+trainer.v1.vppo.recipe=official", *two_updates)
    for step, rows in zip(metrics, batches, strict=True):
        mask, dependency = padded(rows, "response_mask").bool(), padded(rows, "dependency")
        has_image = (dependency >= 0).all(1)
        own = {"scale_min": 1.0, "scale_max": 1.0}  # nothing is multiplied before
        expected = vppo_advantages(padded(rows, "returns"), dependency, mask, has_image=has_image, **own)
        torch.testing.assert_close(padded(rows, "advantages"), expected, **SUMMED)
        assert step["vppo/alpha_min"] == pytest.approx(0.9) and step["vppo/alpha_max"] > 1
        assert step["vppo/drift_kept"] > 0 and step["vppo/drift_filtered"] > 0  # from the second update on
