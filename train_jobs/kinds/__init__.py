"""What each kind of job does: a job of the plan in; the work done, or a look at it, and what is shown of it out.

prepare.py data · train.py a run, and what is published of it · tune.py many runs
evaluate.py a version's metrics, found in measuring/
"""
