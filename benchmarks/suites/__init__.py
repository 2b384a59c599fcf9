"""What is measured. A file here is a suite: it has a `SUITE`, see `benchmarks.contest.Suite`."""
