"""How answers and models are measured: scoring, intervals and comparisons, retention."""
