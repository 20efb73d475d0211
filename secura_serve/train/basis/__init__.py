"""Calibrated bases: which rows and columns of a base are quiet on text that it wrote itself."""
