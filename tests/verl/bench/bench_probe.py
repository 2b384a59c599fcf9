"""Saves what the trainer had at hand once advantages were shaped: a file a step in the folder PROBE."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq

from vppo.verl.trainer import VPPOMixin

FIELDS = ["index", "prompts", "responses", "returns", "dependency", "response_mask", "advantages"]
shape = VPPOMixin._compute_advantage


def shape_and_save(self: VPPOMixin, batch: Any, metrics: dict[str, Any]) -> Any:
    batch = shape(self, batch, metrics)
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=FIELDS)
    rows = [{name: data[name][row] for name in FIELDS} for row in range(len(data))]
    for row in rows:
        row["index"] = int(getattr(row["index"], "data", row["index"]))
    torch.save(rows, Path(os.environ["PROBE"], f"{self.global_steps}.pt"))
    return batch


VPPOMixin._compute_advantage = shape_and_save
