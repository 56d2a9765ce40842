"""Operations on parameter trees: soft prompts, LoRA, freezing, fingerprint, dtypes."""
