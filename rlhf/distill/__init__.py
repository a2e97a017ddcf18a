"""Distillation: guided teachers of many steps into one student that needs neither guidance nor
many steps. `method.py` says what a method is, `objectives.py` holds the formulas.
"""
