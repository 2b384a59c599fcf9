"""Comparing final answers: spelling, units, parts, equality, and the processes that compare."""
