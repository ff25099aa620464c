"""Online serving: requests over HTTP, scored by the bundle in production."""
