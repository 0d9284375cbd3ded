"""How workers share one step: strategy.py is what all offer, choosing.py makes the one a spec asks for.

replicated.py single and ddp · sharded.py fsdp and hsdp · pipelined.py pipeline
gradient_sum.py sums gradients over workers while they appear
"""
