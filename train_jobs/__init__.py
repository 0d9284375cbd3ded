"""Training path: job -> data -> trainer -> checkpoint -> evaluate -> registry version.

__main__.py the command · running.py a job's kind to its module in kinds/, whose views/ people are shown
job.py what is asked for · resolving.py all it needs is found and checked (bases.py, sizes.py) before a worker starts
launch.py a run on Ray Train, told by run_spec.py, kept alive by supervision/, which gives workers trainer/ to run
data/ what is learned from · tasks/ what is learned · trainer/ how · evaluation/ how good it is · tuning/ sweeps
publish.py a finished run becomes a version, or nothing
"""
