"""What a run leaves on disk: resume states, its history, what it is made of, whether files belong together."""
