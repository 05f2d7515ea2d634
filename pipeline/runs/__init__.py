"""A run's files: resume states, history, provenance, and whether files belong to one run.

How a page shows them belongs to `report`, how MLflow does to `tracking`.
"""
