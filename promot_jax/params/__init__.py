"""What is done to parameter trees: soft prompts, LoRA, freezing, fingerprint, dtypes."""
