"""Rewards: each scores a batch of completions. A custom reward runs isolated: its changes to the process are undone."""
