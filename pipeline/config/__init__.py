"""params.yaml: its schema, how it is read, and what is said of a mistake in it. What a value means belongs where it is used."""
