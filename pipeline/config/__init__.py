"""params.yaml: its schema, reading it, and the wording of errors in it. What a value means belongs where it is used."""
