"""What is seen of a run while it trains: evaluations, metrics, completions, and the loggers that take them."""
