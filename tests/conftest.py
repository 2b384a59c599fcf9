"""Settings of every test: one thread, and the same hypothesis examples on every run."""

import hypothesis
import torch

torch.set_num_threads(1)  # two busy threads on a contended machine are slower than one on tensors of this size

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("suite")
