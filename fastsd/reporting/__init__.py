"""Run folders to what people read: one page, figures, a model card.

In: files of runs, views of tokens. Out: `report` (the page of one or several runs), `tokens` (the
page of token views alone), `advantage_figures`, `model_card` and `runs` (a run folder read whole).
"""
