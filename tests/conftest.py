"""Settings of every test: one thread, and the same hypothesis examples on every run."""

import os

import hypothesis
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels then run on the CPU

torch.set_num_threads(1)  # two busy threads on a contended machine are slower than one on tensors of this size

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("suite")
