"""vLLM's workers: adapter slots, the adapter step of each linear, and the fold of weights."""
