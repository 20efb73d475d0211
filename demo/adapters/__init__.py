"""The adapters tab: what the server has, and for its operator, how to change it."""
