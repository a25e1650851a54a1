"""Makes this package a kernel of the Hugging Face Hub: `python -m triton_norm.hub FOLDER`."""
