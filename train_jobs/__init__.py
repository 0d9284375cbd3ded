"""Training path: job -> data -> trainer -> checkpoint -> evaluate -> registry version."""
