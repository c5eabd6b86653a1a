"""Teachers give the log-probabilities of sampled tokens: in this process, served, or several."""
