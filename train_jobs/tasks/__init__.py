"""What is learned: a TaskSpec and prepared data in, a loss to train on, metrics and a published directory out.

spec.py what is asked for · combinations.py what cannot be
"""
