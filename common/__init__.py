"""Reading data, measuring policies, writing runs: everything here works without any algorithm."""
