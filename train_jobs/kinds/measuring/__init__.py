"""What an evaluate job measures: its spec to a model and a question, the question to numbers.

found.py a question that any process can answer · prepared.py asked of prepared data · harness.py asked of lm-eval:
exam.py puts its tasks, outcome.py reads what came of it
"""
