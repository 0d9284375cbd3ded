"""Sources: from a URI in the YAML to a version in the registry.

What was written is parsed by ``cluster.config.sources``; then ``wheel``, ``hub`` or a path (a local file or
directory) -> ``screen`` (what of it may be taken) -> ``convert`` (GGUF or another dtype, in a subprocess that has
torch) -> ``importer`` (the whole of it, idempotent).
"""
