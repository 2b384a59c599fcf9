"""What all tests share."""

import torch

torch.set_num_threads(1)  # the tensors are small, and the machine has few cores
