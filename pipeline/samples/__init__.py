"""From event log to samples: checked, partitioned, joined."""
