"""Benchmarks: how often a model is right, with error bars, and how much of it without looking."""
