"""Whether a run fits, before its first step: its passes simulated on tensors that have shapes and no values."""
