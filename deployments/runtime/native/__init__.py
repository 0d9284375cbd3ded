"""Kernels of our own for CPUs with AMX: a checkpoint and a step in, activations or logits out.

In the order in which a stage uses them:

    architecture.py   config.json -> the facts of a decoder, or the reason why it must run on torch
    build.py          the C++ sources -> a shared library, compiled once per machine
    library.py        its functions and structures, typed
    rope.py           rotary angles
    weights.py        safetensors -> packed memory, one tensor at a time
    slice.py          a stage's slice: one call computes one step
    slice.cpp         the same, inside: a step through the layers
      weights.h       matrices, norms, embedding; how tensors are packed: packing.h, matrix.h
      product.h       activations (activation.h) times a packed matrix, with 4 bits through int4.h
      adapters.h      what low-rank adapters beside the weights add to the products of their own rows
      attention.h     the paged cache, and attention that reads it in place
      team.h          the threads that share a step

Memory of a stage, in bytes (W its matrices' elements, E its embedding's and H its head's, T tokens in a step):

    weights      bfloat16 2 W + 2 H + 2 E, where E counts only if it is not the head's own tensor
                 int8     W + H + 2 E
                 int4     17/32 W + H + 2 E
    adapters     4 bytes for each of their values
    KV cache     per token and layer 2 * num_kv_heads * (head_dim rounded up to 32 + head_dim), bfloat16
    activations  T * (4 hidden + 4 (heads + 2 kv_heads) * head_dim + 2 (hidden + heads * head_dim + intermediate)),
                 with 6 in place of the last 2 when quantized, or where there are adapters; logits
                 4 * sampled rows * vocabulary
"""
