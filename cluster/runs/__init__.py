"""Runs of jobs as they lie on disk: a run directory in, its state, its curves and a page about it out.

files.py what lies where · state.py how far a run is · progress.py the same as a line of its log
"""
