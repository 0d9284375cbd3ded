"""One slice of a replica: the actor around the runtime."""
