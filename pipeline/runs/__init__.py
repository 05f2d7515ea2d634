"""A run's files: resume states, its history, what it is made of, whether files are of one run. What they look like on a page
belongs to `report`, in MLflow to `tracking`.
"""
