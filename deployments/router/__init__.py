"""Which replica answers: routing table and choice."""
