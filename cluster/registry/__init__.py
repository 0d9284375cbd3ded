"""What exists: content-addressed model versions, their aliases and history."""
