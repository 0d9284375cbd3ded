"""What keeps a run alive: workers that die, hang, come and go in, attempts that continue one another out.

room.py how many workers fit · resizing.py when to change their number · watchdog.py who is stuck ·
restarts.py when to give up
monitor.py the actor workers report to · pulse.py their side of it · worker.py what each of them runs
measuring.py the metrics of a checkpoint · evaluations.py when they are taken beside the training
stacks.py what stuck ones were doing · policies.py Ray Train's questions, answered by these
"""
