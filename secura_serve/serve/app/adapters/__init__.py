"""The adapters of a running server: found, verified, kept in versions, and followed on disk."""
