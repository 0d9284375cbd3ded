"""The torch code inside a stage. No Ray."""
