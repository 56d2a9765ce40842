"""Programs compiled for TPUs that are not there."""
