"""Semantic codes: mined pairs, alignment, quantizers, codebooks and their versions."""
