"""Model construction: the stock diffusers and transformers classes at embedded size, and how they
start.
"""
