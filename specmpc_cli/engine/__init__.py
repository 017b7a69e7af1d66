"""The shared engine: tensors in, tensors out. Knows no environment, no dataset and no store."""
