"""Adapters that are whole matrices, asked per request: their images, and which are in a place."""
