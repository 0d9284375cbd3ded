"""One table of log fields and one of metrics."""
