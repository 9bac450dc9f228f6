"""Ports of models that no maintained package has, and loaders of checkpoints in other layouts."""
