"""Item content on Ray: stored tokens, the encoder in training, its service, its pictures."""
