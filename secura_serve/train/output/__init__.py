"""What a run leaves in its folder: checkpoints, tensors, recipe, curves and card."""
