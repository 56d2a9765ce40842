"""The methods: what each trains, and what sets it apart from plain fine-tuning."""
