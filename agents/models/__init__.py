"""Model back ends. Importing this package imports none of torch, transformers, openai and vllm."""
