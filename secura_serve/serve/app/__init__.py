"""The API server's process: what is served, who may ask, and what is folded. Never in a worker."""
