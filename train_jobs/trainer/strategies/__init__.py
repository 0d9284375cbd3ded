"""How workers share one step: strategy.py is what all offer, choosing.py makes the one a spec asks for.

replicated.py single and ddp · sharded.py fsdp and hsdp · pipelined.py pipeline
serving.py parameter_server's first worker · computing.py its others · links.py between · staleness.py who is next
gradient_sum.py sums gradients over workers while they appear
"""
