"""Preparation of data: files of text -> documents -> tokens -> fixed-length sequences on disk, read by index.

``spec`` says what is wanted; ``fetching`` brings sources to this machine, ``chunking`` cuts their files into pieces
of work, ``reading`` and ``cleaning`` make rows of them, ``tokenizing`` makes tokens of rows; ``transform`` is these
three as one function, which ``executors`` runs in this process or on a Ray cluster. ``splitting`` and ``packing``
decide where each document goes, ``shard_writer`` puts it on disk; ``prepare`` is the whole of it.
``shards`` and ``sampler`` are what training reads: sequences by index, in an order that depends on the seed alone.
"""
