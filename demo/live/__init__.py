"""The live tab: the server's metrics as they change."""
