"""What `bench_engine.py` and its test agree on."""

TEMPERATURE, SEED, STEP = 0.8, 3, 7
