"""How good a judge is: agreement with people or with a known truth, calibration, steadiness,
canaries and biases. Pure functions on arrays; `rlhf reward evaluate` reads files and writes pages.

rows.py         judgements on disk -> pictures, pairs and lists
accuracy.py     agreement on pairs, ties
ranking.py      rank correlation and best of N, prompt by prompt
calibration.py  probabilities of pairs
asking.py       a judge's scores, and whether they depend on how it is asked
measure.py      all of it for one judge
"""
