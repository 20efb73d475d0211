"""A rank's part of a fold: what of the base it keeps, where its linears lie, the way back."""
