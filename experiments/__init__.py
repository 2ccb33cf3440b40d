"""The paper's experiments, one file for each topic; reproduce.py makes the runs.

Imports go one way: reproduce -> training -> methods -> problem -> tables; benchmark -> training.
A family of problems (planted, glue, xsum, vtab) imports data and problem, and has a function
problem(config, recipe) -> Problem. report -> figures read what a run wrote, and import no torch.
"""
