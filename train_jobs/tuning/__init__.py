"""Sweeps: a train job and ranges of its settings in, many runs of it and the best of them out.

points.py which values to try · tpe.py values where good ones were · trials.py what became of each, and the best
trial.py one run, as Ray Tune asks for it · scores.py what it is worth · log_tail.py evaluations as they are logged
sweep.py all of them
"""
