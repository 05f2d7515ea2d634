"""The objective: baselines, KL estimators, the loss, the optimizer."""
