"""What `bench_engine.py` and its test agree on."""

TEMPERATURE, SEED, STEP, SCALE_MIN = 0.8, 3, 7, 0.5
