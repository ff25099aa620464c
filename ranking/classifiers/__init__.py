"""From fields, dense features and interests to one representation of the sample, by family."""
