"""Weighted mixes of adapters, which requests name: what they mean, and which the engine knows."""
