"""Item content: towers, fusion, alignment and semantic codes."""
