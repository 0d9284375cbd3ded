"""What the user wrote: one YAML, validated whole, every error at once."""
