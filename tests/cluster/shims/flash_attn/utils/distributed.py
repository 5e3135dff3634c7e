"""Needed by ring attention alone, which no test runs."""


def all_gather(tensor, group):
    raise NotImplementedError("ring attention needs the real flash-attn")
