"""How the paper's experiments are run here: a file for each backbone (``*.yaml``), for each data set (``datasets/``),
for what is common to all (``common/``) and for what is known of single pairs (``released/``).

:mod:`spt_fast.recipe` puts them together.
"""
