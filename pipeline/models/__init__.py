"""Language models: loading, sampling, teacher-forced log-probabilities, and whether these are right for a model
(`verification`). Nothing here knows a reward or an advantage.
"""
