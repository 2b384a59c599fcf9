"""Exact per-token divergences, log-probabilities and shaped-advantage losses from hidden states."""
