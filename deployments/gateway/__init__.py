"""Protocol: HTTP requests in, OpenAI responses out. No Ray, no torch.

In the order a request passes through: ``app`` builds the FastAPI application, ``gate`` and ``admission`` let a
request in, ``body`` reads its JSON, ``openai`` (with ``fields`` and ``extras``) checks it, ``translate`` makes it
messages for the ``backend``, ``http`` carries it through, ``merge`` joins the streams that come back, ``answers``
and ``collect`` make one response of them, ``chunks`` and ``sse`` a stream. ``errors`` is the one table of what
can go wrong; ``telemetry`` is what is measured; ``openapi`` describes all of it.
"""
