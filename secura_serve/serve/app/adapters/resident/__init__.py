"""Adapters that are whole matrices, asked per request: which of them are in a place."""
