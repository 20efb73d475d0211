"""One endpoint's models side by side, over HTTP alone; installed as `secura_serve_demo`."""
