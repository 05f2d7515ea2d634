"""The algorithm: batches, advantages, the loss and its gradient, the optimizer, the metrics of a step, and
`train_step`, which puts them together. No files, no tracker, no wording of findings."""
