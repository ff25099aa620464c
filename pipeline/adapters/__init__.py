"""Public datasets, translated into the data contract."""
