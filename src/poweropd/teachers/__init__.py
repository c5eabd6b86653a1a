"""Teachers: who gives the log-probabilities of sampled tokens."""
