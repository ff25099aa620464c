"""The synthetic marketplace, whose true click probability is known."""
