"""Data and runs of jobs as they lie on disk: their directories in, states, curves and a page about a run out.

files.py what lies where · prepared.py the manifest of prepared data · log.py a step's and an evaluation's line
state.py how far a run is · progress.py the same as a line of its log · sweep.py the trials of a sweep
record.py all of a run · page/ the page about it
"""
