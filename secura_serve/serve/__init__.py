"""One base, many adapters, through vLLM. Importing this imports neither vLLM nor torch."""
