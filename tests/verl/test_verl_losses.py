"""What is added to verl's loss, and what of it is logged."""

from __future__ import annotations

from typing import Any

import bench_torchvision  # noqa: F401  (before transformers)
import pytest
import torch

PROMPTS, RESPONSES = (3, 2), (4, 2)
OLD = [[-1.0, -2.0, -3.0, -0.5], [-1.5, -2.5]]
NEW = [[-1.2, -1.0, -3.0, -9.0], [-0.5, -2.0]]
ADVANTAGES = [[0.5, 0.0, 0.5, 0.5], [0.0, -0.3]]
MASK = [[1, 1, 1, 0], [1, 1]]  # the fourth token is a tool's


def nested(rows: list[list[float]]) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def micro_batch(new: list[list[float]]) -> tuple[dict[str, Any], Any]:
    """What the model returns for two rows, and the rows."""
    from verl.utils import tensordict_utils as tu

    rows = [torch.zeros(prompt + response) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    for row, values in zip(rows, new, strict=True):
        row[-len(values) - 1 : -1] = torch.tensor(values)  # where each of them is predicted
    data = tu.get_tensordict(
        {
            "prompts": nested([[1] * prompt for prompt in PROMPTS]),
            "responses": nested([[1] * response for response in RESPONSES]),
            "old_log_probs": nested(OLD),
            "advantages": nested(ADVANTAGES),
            "response_mask": nested(MASK),
        }
    )
    return {"log_probs": torch.nested.nested_tensor(rows, layout=torch.jagged)}, data


def k3(new: float, old: float) -> float:
    gap = torch.tensor(new - old, dtype=torch.float64)
    return float(gap.exp() - gap - 1)


def test_drift_is_the_mean_k3_of_tokens_with_and_without_gradient() -> None:
    from verl.utils.metric import reduce_metrics

    from vppo.verl.losses import drift_metrics, with_drift

    loss = with_drift(lambda model_output, data, dp_group: (torch.tensor(7.0), {"actor/pg_loss": 7.0}))
    collected: dict[str, Any] = {}
    for new in (NEW, OLD):  # two micro-batches, the second of which has not moved
        output, data = micro_batch(new)
        value, metrics = loss(output, data)
        assert value == 7 and metrics.pop("actor/pg_loss") == 7
        for name, sums in metrics.items():
            collected.setdefault(f"actor/{name}", sums.init_list()).append(sums)
    logged = {**reduce_metrics(collected), "actor/lr": 1.0}
    found = drift_metrics(logged)
    assert logged == {"actor/lr": 1.0}
    assert found == {
        "vppo/drift_kept": pytest.approx((k3(-1.2, -1.0) + k3(-2.0, -2.5)) / 6, rel=1e-5),
        "vppo/drift_filtered": pytest.approx((k3(-1.0, -2.0) + k3(-0.5, -1.5)) / 4, rel=1e-5),
    }


def test_the_penalty_is_the_mean_of_minus_log_p() -> None:
    from verl.utils import tensordict_utils as tu

    from vppo.verl.losses import with_penalty

    loss = with_penalty(lambda model_output, data, dp_group: (torch.tensor(7.0), {}), 0.06)
    output, data = micro_batch(NEW)
    tu.assign_non_tensor(data, batch_num_tokens=20, dp_size=2)
    value, _ = loss(output, data)
    assert value == pytest.approx(7 + 0.06 * (1.2 + 1.0 + 3.0 + 0.5 + 2.0) / 20 * 2)


def test_one_update_of_the_same_rollouts_has_no_drift() -> None:
    from vppo.verl.losses import drift_metrics

    assert drift_metrics({"actor/pg_loss": 1.0}) == {}
