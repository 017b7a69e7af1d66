"""The command line: parses, calls one workflow, shows its report."""
