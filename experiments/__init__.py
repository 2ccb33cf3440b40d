"""The paper's experiments, one file for each topic; reproduce.py trains them.

Imports go one way: problem <- planted, glue, xsum, vtab, baselines <- reproduce.py <- benchmark;
report reads what a run wrote and imports none of them. A family of problems has a table RECIPES,
task -> rank -> Recipe, and a function problem(config, recipe) -> Problem.
"""
