"""GPTModel on CPU and GPU: process set-up, layer spec, model, Hugging Face mapping."""
