"""Control path: one YAML becomes a plan, and the plan becomes a running Ray cluster.

In the order data flows: ``config`` (what the user wrote) and ``registry`` (which model versions exist) are
turned by ``plan`` (what should run where; pure) into actions which ``control`` carries out. ``cli`` is the
``manta`` command over them; ``telemetry`` names every log field and metric; ``units`` and ``errors`` are the
shared vocabulary. Nothing here imports torch.
"""
