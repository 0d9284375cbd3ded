"""One complete copy of a model version: scheduler, block accounting, text."""
