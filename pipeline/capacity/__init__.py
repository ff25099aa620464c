"""What a cluster can train: points of a sweep, their cost, the answer."""
