"""Where a run's weights are: in one process, or spread over many.

In: a policy, its teacher, the world. Out: `placement` (one process, FSDP2; questions shared out
among ranks), and `loss_head`, how the head lies over the ranks and what it then computes.
"""
