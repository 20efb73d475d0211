"""Start, death and end of the server and of the processes that it started."""
