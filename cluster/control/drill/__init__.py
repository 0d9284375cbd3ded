"""Promises while the cluster is hurt and changed: asks -> client -> traffic -> scenarios -> judge -> table."""
