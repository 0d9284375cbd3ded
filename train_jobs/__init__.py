"""Training path: job -> data -> trainer -> checkpoint -> evaluate -> registry version.

__main__.py the command · running.py a job's kind to its module: preparing.py, training.py, tune.py, evaluate.py
job.py what is asked for · resolving.py all it needs is found and checked (bases.py, sizes.py) before a worker starts
launch.py a run on Ray Train, told by run_spec.py, kept alive by supervision/ · materials.py what workers open
publish.py a finished run becomes a version, or nothing · *_tables.py, metrics_view.py, shown.py for people
data/ · tasks/ · trainer/ · evaluation/ · tuning/
"""
