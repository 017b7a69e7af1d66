"""Learning from data with the engine. Knows no environments and no store."""
