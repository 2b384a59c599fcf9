"""`swift rlhf` in this process."""

import sys

import bench_torchvision  # noqa: F401  (before transformers)
import torch
from swift import rlhf_main

if __name__ == "__main__":
    torch.set_num_threads(1)
    rlhf_main(sys.argv[1:])
