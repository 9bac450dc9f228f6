"""Ports of models that no maintained package has."""
