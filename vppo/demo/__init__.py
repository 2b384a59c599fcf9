"""A tiny vision-language model that learns to read handwritten digits with VPPO, on a plain CPU."""
