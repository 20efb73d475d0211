"""The retention tab: what an adapter keeps of its base."""
