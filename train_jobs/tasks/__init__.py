"""What is learned: a TaskSpec and prepared data in, a loss to train on, metrics and a published directory out.

spec.py what is asked for · combinations.py what cannot be · build.py spec to task
lm.py (lm and sft) · classify.py · dpo.py what each learns · evaluating.py sums over the workers' shares
networks.py transformers' models · adapter.py low-rank additions · packing.py documents kept apart
language.py packed sequences to logits · stages.py layers cut for a pipeline · export.py what is published
materials.py task and data of a job, as workers open them
"""
