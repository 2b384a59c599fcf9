"""VPPO: reinforcement learning that rewards a vision-language model for looking."""
