"""Import before transformers: PyPI's torchvision beside a torch for CPUs, whose compiled operators do not load there.

Two declarations let the rest of it be imported; nothing here detects objects.
"""

from importlib.metadata import version

import torch

if "+cpu" in torch.__version__ and "+cpu" not in version("torchvision"):
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
