"""REINFORCE on language models: a reproducible experiment pipeline. One module per DVC stage."""
