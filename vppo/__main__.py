"""`python -m vppo`, which is what `accelerate launch -m vppo` needs."""

from vppo.cli import main

main()
