"""Rewards: functions from completions to numbers, as TRL calls them."""

from vppo.rewards.accuracy import accuracy_reward, equal_answers, last_boxed
from vppo.rewards.format import format_reward

__all__ = ["accuracy_reward", "equal_answers", "format_reward", "last_boxed"]
