"""Getting models and data sets from the hub or a folder, and checking their files. Computing with them belongs elsewhere."""
