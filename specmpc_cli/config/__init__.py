"""Configuration: read-only after validation; unknown keys and impossible values are refused with a sentence."""
