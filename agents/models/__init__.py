"""Language models that run on this machine. Importing this package imports neither torch nor transformers."""
