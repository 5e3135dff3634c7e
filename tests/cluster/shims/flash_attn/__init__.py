"""Stands in for flash-attn, which needs CUDA: the four functions on rows that OpenRLHF imports, and no attention."""
