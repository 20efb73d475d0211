"""The training itself: a prepared model, rows and a loss, step by step."""
