"""Narrow ResNets, timm models, and the pyramids on top of them."""
