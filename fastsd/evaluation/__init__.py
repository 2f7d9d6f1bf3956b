"""How good a solver is, and where contexts press on its tokens.

In: a configuration, or rollouts. Out: `solver` opens what every command needs; `results` are
evaluations, `scores` their statistics, `summary` a comparison's numbers; `measure` gives `views`
of tokens and their `localisation`; `filter` keeps questions that are hard but learnable.
"""
