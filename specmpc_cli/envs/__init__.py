"""Tasks behind one contract (adapter.py). Knows no models; suites are imported on use."""
