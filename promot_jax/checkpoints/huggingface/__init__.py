"""Hugging Face folders: config, tensor names, safetensors."""
