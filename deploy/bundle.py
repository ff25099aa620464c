"""A bundle: what serving needs of a trained model, as safetensors and JSON, without pickle.

bundle/bundle.json          recipe, schema version, files and their SHA-256
bundle/dense.safetensors    everything that is not a table
bundle/tables/<table>.safetensors   one tensor `weight` (rows, dim) a table; written in blocks
"""
