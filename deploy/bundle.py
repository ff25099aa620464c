"""A bundle: what scoring needs of a trained model, as safetensors and JSON, without pickle.

bundle.json                               recipe, tables, files and their SHA-256
dense.safetensors                         every parameter and buffer that is not a table
tables/<table>/rows-NNNNNNNNNN.safetensors   `weight` (rows, dim): a block of rows a file
ids/<table>.safetensors                   managed collision only: `raw_ids` and their `rows`
"""
