"""What a cache does to a model's answers: perplexity and KL divergence, tasks, and the calibration of methods that want it."""
