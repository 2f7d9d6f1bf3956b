"""How good a response is: a number, or None for no signal. Add a reward here.

In: rollouts. Out: rewards, and their advantages within a group. All of it in `functions`;
`math_worker` is a process of its own.
"""
