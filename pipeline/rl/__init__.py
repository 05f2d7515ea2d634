"""The algorithm, touching no files: batches, advantages, the loss and its gradient, the optimizer, the metrics of a step."""
