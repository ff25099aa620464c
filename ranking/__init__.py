"""The dense side: interactions, classifiers, tasks, losses, metrics, the training loop."""
