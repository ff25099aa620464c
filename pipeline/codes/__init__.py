"""Semantic codes on Ray: pairs, alignment, quantization, code columns and their tables."""
