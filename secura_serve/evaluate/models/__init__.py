"""Who is asked: models behind an endpoint, or a base with its adapters in this process."""
