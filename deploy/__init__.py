"""What is shipped: bundles, scoring, and the `braid` command that puts everything together."""
