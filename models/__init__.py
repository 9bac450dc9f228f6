"""Ports of models that no maintained package has, what the packaged ones lack, and loaders of other layouts."""
