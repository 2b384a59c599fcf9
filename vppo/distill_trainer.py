"""TRL's on-policy distillation with this library's divergence: one override.

TRL samples, batches and optimises. Its loss is replaced: the divergence keeps its digits where student and teacher
nearly agree, holds 256 MiB of tiles at most, leaves padding out on every device, and takes heads padded to different
sizes. For images there are two options that TRL has not: the student may be shown a perturbed view, and tokens may be
weighed by what the image tells the teacher about them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl import DistillationTrainer

from vppo.batch import IMAGE_INPUTS, TOKEN_INPUTS, Batch, View
from vppo.distill import Distillation, Head, distillation_loss, visual_weights
from vppo.errors import InputError
from vppo.heads import head_forward
from vppo.perturbations import Perturbation, seeded
from vppo.seams import MovedSeamError, lacking
from vppo.trl_utils import TESTED
from vppo.views import ImageViews
from vppo_kernels import linear_divergence

SEAM = "trl.trainer.distillation_trainer:DistillationTrainer"


class ExactDistillationTrainer(DistillationTrainer):
    """`trl.DistillationTrainer` with the exact divergence. Takes the same arguments, and `beta` as TRL means it.

    Args:
        model, teacher_model, args, kwargs: TRL's.
        vocab_size: Where the heads are padded to different sizes, how many of their entries are vocabulary: usually
            `len(tokenizer)`. TRL refuses such pairs (Qwen2.5's 7B has 152,064 rows, its 1.5B 151,936). The teacher is
            then a model, not a name.
        student_view: The student is shown the images perturbed so, and the teacher the clean ones; None for clean ones.
        weighing_view: The teacher is also shown the images perturbed so, and tokens are weighed by its visual advantage
            (VA-OPD); None for equal weights. Responses of problems without image have equal weights.

    Raises:
        InputError: No teacher, or a name where a model is needed; `vocab_size` beyond a head; a processor whose images
            cannot be perturbed as tensors; DeepSpeed ZeRO-3, whose backward would not find the weights.
        MovedSeamError: This TRL is not one that is overridden here.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: Any = None,
        *,
        vocab_size: int | None = None,
        student_view: Perturbation | None = None,
        weighing_view: Perturbation | None = None,
        **kwargs: Any,
    ) -> None:
        _check_seams()
        if teacher_model is None:
            raise InputError("teacher_model: got None, takes a model, or the name of one")
        if vocab_size is not None and isinstance(teacher_model, str):
            raise InputError(f"teacher_model: got {teacher_model!r}, takes a loaded model where vocab_size is given")
        # TRL compares the sizes of both heads, but only of a teacher that it prepares itself
        super().__init__(model, teacher_model if vocab_size is None else None, args, **kwargs)
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            raise InputError("deepspeed: got ZeRO stage 3, takes FSDP2 or a stage up to 2")
        if vocab_size is not None:
            sizes = [len(m.get_output_embeddings().weight) for m in (self.model, teacher_model)]
            if not 1 <= vocab_size <= min(sizes):
                raise InputError(f"vocab_size: got {vocab_size!r}, takes 1 to {min(sizes)} (heads have {sizes} rows)")
            self.teacher_model = self.accelerator.prepare_model(teacher_model, evaluation_mode=True)
        self._shared, self._student_view, self._weighing_view = vocab_size, student_view, weighing_view
        if student_view is not None or weighing_view is not None:
            self._images = _pixel_views(self.processing_class)

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """TRL's: the loss, the sum of the student's entropy, and the number of tokens of a micro-batch."""
        tokens = inputs["completion_ids"].shape[1]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        clean = {name: inputs[name] for name in (*IMAGE_INPUTS, *TOKEN_INPUTS) if name in inputs}
        teacher = self.accelerator.unwrap_model(self.teacher_model)

        def hidden(model: Any, view: Perturbation | None, draw: int = 0) -> Tensor:
            shown = clean if view is None else {**clean, **self._perturbed(inputs, view, draw)}
            found: Tensor = self._get_last_hidden_state(model, ids, attention, tokens, **shown)
            return found

        def taught(view: Perturbation | None) -> Tensor:
            found: Tensor = self._forward_redirection(self.teacher_model, teacher, hidden, teacher, view, 1)
            return found.to(teacher_head.weight.device)  # of a model that is spread over devices

        self.teacher_model.eval()
        with torch.no_grad():
            teacher_head = _whole(Head.of(teacher))
            teacher_hidden, weights = taught(None), None
            if self._weighing_view is not None and "pixel_values" in clean:
                other = taught(self._weighing_view)
                weights = self._weights(teacher_head, teacher_hidden, other, inputs["completion_ids"], mask, inputs)
        results: list[Distillation] = []

        def at_head(head: Any, found: Tensor) -> Tensor:
            device = head.weight.device
            given: list[Any] = [found, teacher_hidden, mask, weights, num_items_in_batch]
            here = [value.to(device) if isinstance(value, Tensor) else value for value in given]
            results.append(
                distillation_loss(
                    here[0], Head.of(unwrapped_student), here[1], teacher_head, here[2], kind="jsd", beta=self.beta,
                    temperature=self.temperature, weights=here[3], denominator=here[4], vocab_size=self._shared,
                )
            )  # fmt: skip
            return results[0].loss

        with head_forward(unwrapped_student, at_head):
            loss = unwrapped_student.get_output_embeddings()(hidden(unwrapped_student, self._student_view))
        return loss, results[0].entropy.sum(), mask.sum()

    def _perturbed(self, inputs: dict[str, Any], view: Perturbation, draw: int) -> dict[str, Tensor]:
        """The perturbed `pixel_values` of a micro-batch, drawn by (seed, micro-step, draw, row)."""
        if "pixel_values" not in inputs:
            return {}
        batch, key = Batch(inputs), (self.args.seed, self._step, draw)
        rows = list(range(len(batch)))
        first = self.accelerator.process_index * len(batch)
        pixels = {
            row: batch.perturbed_pixels(row, self._images.layout, view, seeded(*key, first + row)) for row in rows
        }
        shown: Tensor = batch.whole(rows, View(rows, pixels))["pixel_values"]
        return {"pixel_values": shown}

    def _weights(
        self, head: Head, clean: Tensor, perturbed: Tensor, targets: Tensor, mask: Tensor, inputs: dict[str, Any]
    ) -> Tensor:
        """`[B, T]` of the teacher's visual advantage; responses of problems without image have 1 everywhere."""
        has_image, targets, mask = (x.to(clean.device) for x in (Batch(inputs).has_image, targets, mask))
        inside = mask & has_image.unsqueeze(1)
        views = linear_divergence(
            clean[inside], perturbed[inside], head.weight, head.bias, targets=targets[inside],
            logit_scale=head.logit_scale, softcap=head.softcap, vocab_size=self._shared,
        )  # fmt: skip
        assert views.logprobs is not None and views.logprobs_perturbed is not None
        advantage = (views.logprobs - views.logprobs_perturbed).clamp_min(0)
        scores = advantage.new_zeros(mask.shape).masked_scatter(inside, advantage)
        return torch.where(has_image.unsqueeze(1), visual_weights(scores, inside), 1.0)


def _whole(head: Head) -> Head:
    """The head of a teacher that came split by FSDP2, gathered: the backward of the student's loss reads it again."""
    bias = head.bias.full_tensor() if isinstance(head.bias, DTensor) else head.bias
    return head._replace(weight=head.weight.full_tensor(), bias=bias) if isinstance(head.weight, DTensor) else head


def _pixel_views(processor: Any) -> ImageViews:
    if getattr(processor, "image_processor", None) is None:
        raise InputError(f"processing_class: got {type(processor).__name__}, takes a processor of images for a view")
    views = ImageViews.of(processor)
    if not views.on_pixels:
        raise InputError(
            f"processing_class: got {type(processor).__name__}, which cuts pictures into tiles; takes one that shows "
            "every image once for a perturbed view"
        )
    return views


def _check_seams() -> None:
    missing = [
        *lacking(f"{SEAM}.compute_loss", uses=["_compute_loss", "_forward_redirection"]),
        *lacking(f"{SEAM}._compute_loss", ["unwrapped_student", "inputs", "num_items_in_batch"]),
        *lacking(f"{SEAM}._get_last_hidden_state", ["input_ids", "attention_mask", "logits_to_keep", *IMAGE_INPUTS]),
    ]
    if missing:
        raise MovedSeamError(f"trl: lacks {'; '.join(missing)}; takes {TESTED}")
