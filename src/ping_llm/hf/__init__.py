"""A trained model in, a folder that transformers and the Hugging Face hub take out. Needs the extra `hf`."""
