"""What a person sees: plans and results of jobs in; tables of 80 columns, and the same as JSON values, out.

shown.py one result, for both · tables.py how tables look · data.py · training.py · metrics.py · sweep.py
"""
