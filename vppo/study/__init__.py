"""Which tokens carry the learning: several ways to choose them, on a task small enough to repeat with many seeds."""
