"""The registry: what model versions exist, which names point at them, and how a source becomes a version.

In the order data flows: ``sources`` (a URI becomes a screened, converted directory) -> ``store`` (the directory
becomes blobs and a manifest) -> ``alias`` (a name points at the version) -> ``materialize`` (a verified local
directory to load from) and ``facts`` (what the planner must know) -> ``gc`` (what nothing points at goes away).
``manifest`` holds the nouns, ``tree`` the few file operations that everything is built on.
"""
