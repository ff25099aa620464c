"""Stages on Ray: from the event log to a published bundle."""
