"""Language models: loading, sampling, teacher-forced log-probabilities, and checks that a model computes them right
(`verification`). Nothing here knows a reward or an advantage.
"""
