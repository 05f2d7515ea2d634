"""Rewards: each scores a whole batch of completions at once."""
