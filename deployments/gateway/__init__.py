"""Protocol: HTTP requests in, OpenAI responses out. No Ray, no torch (``metrics`` alone binds to the cluster's).

In the order a request passes through: ``sharing`` opens the listening socket, ``server`` accepts from it on a
``thread`` of its own, ``protocol`` reads HTTP, ``app`` builds the FastAPI application, ``gate`` and ``admission`` let
a request in as a ``call``, ``http`` carries it through, ``body`` reads its JSON, ``invalid`` checks it against
``openai`` (and its ``fields``), ``translate`` makes it messages for the ``backend``, ``merge`` joins the streams that
come back, ``answers`` and ``collect`` make one response of them, ``chunks`` and ``sse`` a stream. ``errors`` is the
one table of what can go wrong, ``closing`` ends requests when the process stops, ``telemetry`` is what is measured,
``openapi`` describes all of it.
"""
