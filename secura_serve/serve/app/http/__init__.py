"""What every HTTP request passes: the guard (who may ask), then admission (on which weights)."""
