"""Who teaches, and the forward passes of student and teacher. Add a teacher here.

In: a policy, micro-batches. Out: `self_teacher` (the live, averaged or frozen model) and `passes`,
hidden states of both over a micro-batch, what they share computed once.
"""
