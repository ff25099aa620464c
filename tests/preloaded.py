"""What ranks need, imported before the fork; none of it starts computing or opens a device."""

import gc

# A collection finds nothing in what was imported, and would copy all of it in every fork.
gc.disable()

import pyarrow.parquet  # noqa: E402, F401
import pytest  # noqa: E402, F401

import pipeline.content.training  # noqa: E402
import pipeline.training_worker  # noqa: E402, F401

gc.freeze()
gc.enable()
