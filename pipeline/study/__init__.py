"""`braid study`: variants x seeds, side by side."""
