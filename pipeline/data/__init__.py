"""Prompts and models from where they are: a hub, a package, a folder."""
