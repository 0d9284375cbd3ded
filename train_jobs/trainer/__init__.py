"""What trains: spec -> batches -> strategy (forward, backward) -> gradients -> optimizer -> checkpoint, step by step.

spec.py what is asked for · task.py what is learned · duration.py how many steps · batches.py which sequences
strategies/ how workers share the work · optimizers.py, schedules.py, gradients.py, averaging.py one update
state.py, checkpoint.py, committed.py what survives · meters.py what a person watches
materials.py what a run works with · loop.py a run · attempt.py its steps
hooks.py what its surroundings are told and asked
"""
