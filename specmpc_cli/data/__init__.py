"""Datasets on disk. Knows no models and no environments."""
