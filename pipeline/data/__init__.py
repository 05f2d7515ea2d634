"""Prompts, models and encoders from where they are: the hub, a package, a folder. What is done with them belongs elsewhere."""
