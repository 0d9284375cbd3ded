"""Request path: HTTP -> gateway -> router -> replica -> stage 0 .. n-1 -> tokens stream back.

``app`` binds the Serve deployments together, ``front`` is one gateway process. ``gateway`` speaks the OpenAI
protocol, ``router`` picks a replica, ``replica`` owns one copy of a model version (tokenizes, schedules,
detokenizes), ``stage`` runs one slice of its layers, ``runtime`` is the torch code inside a stage. ``messages`` are
the nouns that cross processes and ``channel`` is how they do.
"""
