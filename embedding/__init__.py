"""The sparse side: feature schema, batches, tables, sharding, checkpoints."""
