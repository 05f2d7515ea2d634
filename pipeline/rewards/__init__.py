"""Rewards: each scores a whole batch of completions at once. What a reward may do to its process is undone here too."""
